"""Batches for the training loop from splits that lie in memory.

Every epoch shuffles the whole split by (seed, epoch). A global batch is the same images,
augmented and mixed in the same way, whatever the number of workers; each takes its shard of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from fer_ray.config.schema import TrainConfig
from fer_ray.data.dataset import DatasetInfo
from fer_ray.training.feed import (
    EVALUATION_BATCH_SIZE,
    Augmentation,
    Batch,
    Images,
    as_tensor,
    own_part,
)
from fer_ray.training.process_group import ProcessGroup
from fer_ray.transforms.mixing import MixPlan, draw_mix

_RESIDENT_FRACTION = 0.25
"""Largest fraction of a GPU's free memory that the images of a split may take."""


class MemoryFeed:
    """Both splits whole on every worker; on the GPU if the images fit into its memory."""

    def __init__(
        self,
        config: TrainConfig,
        info: DatasetInfo,
        train: Images,
        validation: Images,
        *,
        group: ProcessGroup,
    ) -> None:
        self._config, self._group = config, group
        self._own = own_part(config, group)
        self._input_size = config.model.input_size or info.image_size
        self._augmentation = Augmentation(config, info, group.device)
        self._labels = torch.from_numpy(np.array(train.labels))
        self._validation = validation
        self._pixels = as_tensor(train.pixels)
        if group.device.type == "cuda" and not self._augmentation.on_cpu:
            free, _ = torch.cuda.mem_get_info(group.device)
            if self._pixels.nbytes <= _RESIDENT_FRACTION * free:
                self._pixels = self._pixels.to(group.device)
                self._labels = self._labels.to(group.device)
        self.steps_per_epoch = len(train.labels) // config.schedule.global_batch_size
        self.class_counts = np.bincount(train.labels, minlength=len(info.labels))

    def train(self, epoch: int) -> Iterator[Batch]:
        seed = self._config.schedule.seed
        order = np.random.default_rng((seed, epoch)).permutation(len(self._labels))

        def gather(step: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray, MixPlan | None]:
            return self._gather(order, epoch, step)

        for images, targets, samples, plan in self._ahead(gather):
            images = self._augmentation.finish(images, samples, epoch)
            targets = targets.to(self._group.device, non_blocking=True)
            mix = plan.of(self._own, self._group.device) if plan else None
            yield Batch(images=images, targets=targets, mix=mix)

    def _gather(
        self, order: np.ndarray, epoch: int, step: int
    ) -> tuple[torch.Tensor, torch.Tensor, np.ndarray, MixPlan | None]:
        """The images of one step, unchanged or augmented by albumentations."""
        schedule = self._config.schedule
        size = schedule.global_batch_size
        plan = draw_mix(
            self._config.transforms, (schedule.seed, epoch, step), size, self._input_size
        )
        own = self._own
        needed = plan.needed(own) if plan else np.arange(own.start, own.stop)
        samples = order[step * size + needed]
        rows = _moved(torch.from_numpy(samples), self._pixels.device)
        # `index_select`, since indexing by brackets takes ten times as long on a CPU
        images, targets = self._pixels.index_select(0, rows), self._labels.index_select(0, rows)
        if self._augmentation.on_cpu:
            changed = self._augmentation.on_cpu(images.numpy(), samples, epoch)
            images = torch.from_numpy(changed)
        if self._group.device.type == "cuda" and images.device.type == "cpu":
            images, targets = images.pin_memory(), targets.pin_memory()
        return images, targets, samples, plan

    def _ahead(self, gather: Callable) -> Iterator:
        """The result of every step's `gather`, computed one step ahead where that helps."""
        on_cpu = self._group.device.type == "cpu"
        if not self._augmentation.on_cpu and (on_cpu or self._pixels.is_cuda):
            # a second thread would compete for the cores, or have nothing to do
            yield from map(gather, range(self.steps_per_epoch))
            return
        with ThreadPoolExecutor(1) as pool:
            following = pool.submit(gather, 0)
            for step in range(self.steps_per_epoch):
                current = following.result()
                if step + 1 < self.steps_per_epoch:
                    following = pool.submit(gather, step + 1)
                yield current

    def validation(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        part = self._group.shard(len(self._validation.labels))
        pixels = as_tensor(self._validation.pixels[part])
        labels = torch.from_numpy(np.array(self._validation.labels[part]))
        for images, targets in zip(
            pixels.split(EVALUATION_BATCH_SIZE), labels.split(EVALUATION_BATCH_SIZE)
        ):
            if len(targets):
                yield _moved(images, self._group.device), _moved(targets, self._group.device)

    def histogram(self, count: Callable[[torch.Tensor], torch.Tensor]) -> np.ndarray:
        part = self._pixels[self._group.shard(len(self._labels))]
        total = torch.zeros(256, dtype=torch.int64)
        for images in part.split(EVALUATION_BATCH_SIZE):
            total += count(images).cpu()
        return total.numpy()


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
