"""Batches for the training loop, from a split that lies in memory.

Every epoch shuffles the whole split by (seed, epoch). A global batch is the same images,
changed and mixed in the same way, whatever the number of workers; each takes its part of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from fer_ray.config.schema import TrainConfig
from fer_ray.data.dataset import DatasetInfo
from fer_ray.data.labels import UNKNOWN_LABEL
from fer_ray.training.process_group import ProcessGroup
from fer_ray.transforms.albumentations_engine import AlbumentationsAugmenter, fill_of
from fer_ray.transforms.device_engine import DeviceAugmenter
from fer_ray.transforms.mixing import Mix, MixPlan, draw_mix

EVALUATION_BATCH_SIZE = 256
_RESIDENT_SHARE = 0.25
"""The most of a GPU's free memory that the images of a split may take."""


@dataclass(frozen=True, kw_only=True)
class Images:
    """Labelled images in memory."""

    pixels: np.ndarray
    """(N, S, S) uint8; may be read-only."""
    labels: np.ndarray
    """(N,) int64, none of them unknown."""

    @classmethod
    def known(cls, pixels: np.ndarray, labels: np.ndarray) -> Images:
        """Those of the images whose label is known; nothing is copied where all are."""
        keep = np.flatnonzero(labels != UNKNOWN_LABEL)
        if len(keep) == len(labels):
            return cls(pixels=pixels, labels=labels)
        return cls(pixels=pixels[keep], labels=labels[keep])


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One worker's part of a global batch, on its device."""

    images: torch.Tensor
    """(M, S, S) uint8, augmented: the worker's own N, then those that are only mixed in."""
    targets: torch.Tensor
    """(M,) int64."""
    mix: Mix | None
    """How the first N are mixed; None: not at all, and N is M."""


class Feed(Protocol):
    """What the loop asks of either way to load."""

    steps_per_epoch: int
    class_counts: np.ndarray
    """(classes,) images of the train split."""

    def train(self, epoch: int) -> Iterator[Batch]:
        """This worker's part of each of an epoch's global batches."""
        ...

    def validation(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """This worker's part of the validation split: (N, S, S) uint8 and (N,) int64."""
        ...

    def histogram(self, count: Callable[[torch.Tensor], torch.Tensor]) -> np.ndarray:
        """The sum of `count`, an int64 histogram, over this worker's part of the train split."""
        ...


def library_augmenter(config: TrainConfig, pixel_mean: float, size: int) -> AlbumentationsAugmenter:
    """The `albumentations` engine for a data set's images."""
    seed, fill = config.schedule.seed, fill_of(pixel_mean)
    return AlbumentationsAugmenter(config.transforms, seed=seed, fill=fill, image_size=size)


class Augmentation:
    """The engine that a configuration asks for, on the worker's device."""

    def __init__(self, config: TrainConfig, info: DatasetInfo, device: torch.device) -> None:
        self.device = device
        self.library: AlbumentationsAugmenter | None = None
        self.on_device: DeviceAugmenter | None = None
        if config.transforms.engine == "albumentations":
            self.library = library_augmenter(config, info.pixel_mean, info.image_size)
        else:
            seed, fill = config.schedule.seed, fill_of(info.pixel_mean)
            self.on_device = DeviceAugmenter(config.transforms, seed=seed, fill=fill)

    def finish(self, images: torch.Tensor, samples: np.ndarray, epoch: int) -> torch.Tensor:
        """Moves images to the device and, where that is the engine, changes them there."""
        images = images.to(self.device, non_blocking=True)
        return self.on_device(images, samples, epoch) if self.on_device else images


class MemoryFeed:
    """Both splits whole on every worker; on the GPU if the images fit there."""

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
        self._input_size = config.model.input_size or info.image_size
        self._augmentation = Augmentation(config, info, group.device)
        self._labels = torch.from_numpy(np.array(train.labels))
        self._validation = validation
        self._pixels = as_tensor(train.pixels)
        if group.device.type == "cuda" and not self._augmentation.library:
            free, _ = torch.cuda.mem_get_info(group.device)
            if self._pixels.nbytes <= _RESIDENT_SHARE * free:
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

    @property
    def _own(self) -> slice:
        return self._group.part(self._config.schedule.global_batch_size)

    def _gather(
        self, order: np.ndarray, epoch: int, step: int
    ) -> tuple[torch.Tensor, torch.Tensor, np.ndarray, MixPlan | None]:
        """The images of one step as they lie in memory, or changed by the library."""
        schedule = self._config.schedule
        size = schedule.global_batch_size
        plan = draw_mix(
            self._config.transforms, (schedule.seed, epoch, step), size, self._input_size
        )
        own = self._own
        needed = plan.needed(own) if plan else np.arange(own.start, own.stop)
        samples = order[step * size + needed]
        rows = _moved(torch.from_numpy(samples), self._pixels.device)
        # not by brackets, which take ten times as long on a CPU
        images, targets = self._pixels.index_select(0, rows), self._labels.index_select(0, rows)
        if self._augmentation.library:
            changed = self._augmentation.library(images.numpy(), samples, epoch)
            images = torch.from_numpy(changed)
        if self._group.device.type == "cuda" and images.device.type == "cpu":
            images, targets = images.pin_memory(), targets.pin_memory()
        return images, targets, samples, plan

    def _ahead(self, gather: Callable) -> Iterator:
        """The result of every step's `gather`, the next made while one is used if that helps."""
        on_cpu = self._group.device.type == "cpu"
        if not self._augmentation.library and (on_cpu or self._pixels.is_cuda):
            # a second thread would compete for the cores, or has nothing to do
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
        part = self._group.part(len(self._validation.labels))
        pixels = as_tensor(self._validation.pixels[part])
        labels = torch.from_numpy(np.array(self._validation.labels[part]))
        for images, targets in zip(
            pixels.split(EVALUATION_BATCH_SIZE), labels.split(EVALUATION_BATCH_SIZE)
        ):
            if len(targets):
                yield images.to(self._group.device), targets.to(self._group.device)

    def histogram(self, count: Callable[[torch.Tensor], torch.Tensor]) -> np.ndarray:
        part = self._pixels[self._group.part(len(self._labels))]
        total = torch.zeros(256, dtype=torch.int64)
        for images in part.split(EVALUATION_BATCH_SIZE):
            total += count(images).cpu()
        return total.numpy()


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor on an array's memory, which may be read-only, as shared memory is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
