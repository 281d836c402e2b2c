"""What the benchmark times: the real training loop and a plain one, in alternating rounds."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from fer_ray.config.schema import TrainConfig
from fer_ray.data.dataset import DatasetInfo, load_split, read_info
from fer_ray.models import registry
from fer_ray.models.forward import Forward, resize
from fer_ray.models.precision import autocast
from fer_ray.runtime.process import keep_freed_memory
from fer_ray.training.feed import Feed, Images
from fer_ray.training.loop import Trainer
from fer_ray.training.memory_feed import MemoryFeed
from fer_ray.training.process_group import ProcessGroup

EPOCHS = 7
"""Epochs of the real run; the first is compared with the later ones."""

_LEARNING_RATE = 0.001
"""Learning rate of every loop: speed does not depend on it, and the weights must stay finite."""
_MAX_IMAGES_PER_ROUND = 2**18
_MAX_FLOAT_BYTES = 2**30
"""Upper bound for the plain loop's normalized images, over which it cycles."""


@dataclass(frozen=True, kw_only=True)
class WorkerContext:
    """What one worker needs to measure."""

    config: TrainConfig
    """The result of `for_measuring`."""
    info: DatasetInfo
    group: ProcessGroup
    threads: int
    """torch's threads in this worker."""
    train: Images
    """The whole train split."""
    validation: Images
    """The whole validation split."""

    @classmethod
    def load(cls, settings: dict[str, Any], *, threads: int | None = None) -> WorkerContext:
        """Reads the data and sets torch's threads, in a worker of Ray Train.

        Args:
            settings: with ``config``, the result of `TrainConfig.to_dict`.
            threads: number of threads; None: as the configuration has it.
        """
        import ray.train
        import ray.train.torch

        keep_freed_memory()  # as a training worker does; the plain loops in this process profit too
        config = TrainConfig.from_dict(settings["config"])
        world = ray.train.get_context()
        info = read_info(config.data)
        splits = (load_split(info, name) for name in ("train", "validation"))
        train, validation = (Images.known(split.images, split.labels) for split in splits)
        threads = threads or threads_of(config)
        torch.set_num_threads(threads)
        return cls(
            config=config,
            info=info,
            group=ProcessGroup(
                rank=world.get_world_rank(),
                size=world.get_world_size(),
                device=ray.train.torch.get_device(),
            ),
            threads=threads,
            train=train,
            validation=validation,
        )

    def feed(self, steps: int) -> MemoryFeed:
        """A feed from memory: `steps` steps an epoch, and an eighth as many validation images."""
        count = steps * self.config.schedule.global_batch_size
        validation = spread(self.validation, max(count // 8, self.group.size))
        train = spread(self.train, count)
        return MemoryFeed(self.config, self.info, train, validation, group=self.group)

    def trainer(self, feed: Feed) -> Trainer:
        """A trainer of the real loop, without lines of progress."""
        labels: dict[str, Any] = {"run": "benchmark", "environment": {}}
        return Trainer(self.config, self.info, feed, group=self.group, labels=labels, resume=None)

    def plain(self, forward: Forward, batch_size: int, steps: int) -> PlainLoop:
        """The plain loop in the precision and memory layout of the real one."""
        batches = float_batches(
            self.train, forward, batch_size=batch_size, steps=steps, device=self.group.device
        )
        return PlainLoop(
            self.config, self.info, batches, self.group.device, precision=forward.precision
        )


def threads_of(config: TrainConfig) -> int:
    """Number of torch's threads in a worker, as in a training run."""
    return config.scaling.threads_per_worker or max(int(config.scaling.cpus_per_worker), 1)


def for_measuring(config: TrainConfig, **schedule: Any) -> TrainConfig:
    """A configuration for a short run whose weights stay finite; compiled only where required.

    Args:
        config: what is measured.
        schedule: values of the schedule section to set.
    """
    values = config.to_dict()
    values["optimizer"] |= {"learning_rate": _LEARNING_RATE}
    short: dict[str, Any] = {
        "warmup_epochs": 1.0,
        "epochs": EPOCHS,
        "patience": 0,
        "time_limit_s": 0.0,
    }
    if config.schedule.compile == "auto":
        short["compile"] = "off"
    values["schedule"] |= {**short, **schedule}
    return TrainConfig.from_dict(values)


class PlainLoop:
    """A minimal training loop on normalized float images.

    It has no augmentation, no average of the weights and no gradient clipping.

    Args:
        config: of which the model and the seed are used.
        info: the dataset.
        batches: images (N, 1, S, S) float32 and classes (N,) int64, on the device.
        device: where the loop computes.
        precision: arithmetic of the forward pass, one of `precision.ORDER`.
        channels_last: memory layout of the weights; otherwise contiguous.
    """

    def __init__(
        self,
        config: TrainConfig,
        info: DatasetInfo,
        batches: list[tuple[torch.Tensor, torch.Tensor]],
        device: torch.device,
        *,
        precision: str,
        channels_last: bool = True,
    ) -> None:
        self.batches, self._precision, self._device = batches, precision, device
        torch.manual_seed(config.schedule.seed)
        model = registry.build(
            config.model, num_classes=len(info.labels), image_size=info.image_size
        )
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self._model = model.to(device, memory_format=layout).train()  # type: ignore[call-overload]
        self._optimizer = torch.optim.SGD(model.parameters(), lr=_LEARNING_RATE, momentum=0.9)

    def train(self, steps: int) -> int:
        """Trains for some steps; returns the number of images."""
        num_images = 0
        for images, targets in itertools.islice(itertools.cycle(self.batches), steps):
            self._optimizer.zero_grad()
            with autocast(self._device, self._precision):
                loss = F.cross_entropy(self._model(images), targets)
            loss.backward()
            self._optimizer.step()
            num_images += len(images)
        return num_images


def spread(images: Images, count: int) -> Images:
    """`count` images, spread evenly over all of them; repeated if there are fewer."""
    num = len(images.labels)
    if count <= num:
        rows = np.linspace(0, num - 1, count).round().astype(np.int64)
    else:
        rows = np.arange(count) % num
    return Images(pixels=images.pixels[rows], labels=images.labels[rows])


def float_batches(
    images: Images, forward: Forward, *, batch_size: int, steps: int, device: torch.device
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Up to `steps` batches on the device, normalized and resized for the network.

    Returns:
        Images (N, C, S, S) float32 and classes (N,) int64 of each batch.
    """
    side = forward.input_size or images.pixels.shape[1]
    limit = max(_MAX_FLOAT_BYTES // (4 * side**2 * batch_size), 2)
    chosen = spread(images, batch_size * min(steps, limit))
    batches = []
    for start in range(0, len(chosen.labels), batch_size):
        pixels = torch.from_numpy(chosen.pixels[start : start + batch_size]).to(device)
        batch = resize(forward.normalizer(pixels), forward.input_size)
        targets = torch.from_numpy(chosen.labels[start : start + batch_size]).to(device)
        batches.append((batch.contiguous(memory_format=torch.channels_last), targets))
    return batches


def now(device: torch.device) -> float:
    """Seconds of a monotonic clock, read after the GPU has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def rate(work: Callable[[], int], device: torch.device, at_least_s: float = 0.0) -> float:
    """Images/s of `work`, repeated until `at_least_s` seconds have passed.

    Args:
        work: processes images and returns their number.
        device: is waited for before the clock is read.
        at_least_s: 0 runs the work once.
    """
    start, num_images = now(device), 0
    while True:
        num_images += work()
        if (elapsed := now(device) - start) >= at_least_s:
            return num_images / elapsed


def in_turn(candidates: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Runs the candidates in turn (A B A B …) and returns images/s of each round of each.

    One round of each comes before as a warm-up and is dropped.
    """
    rates: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(-1, rounds):
        for name, measure in candidates.items():
            value = measure()
            if number >= 0:
                rates[name].append(value)
    return rates


def steps_for(step_s: float, round_s: float, batch_size: int) -> int:
    """Number of steps that take about `round_s` seconds, at least 2."""
    limit = max(_MAX_IMAGES_PER_ROUND // batch_size, 2)
    return min(max(round(round_s / step_s), 2), limit)


def step_seconds(plain: PlainLoop, device: torch.device) -> float:
    """Seconds per step of the plain loop, after two steps of warm-up."""
    plain.train(2)
    steps, start = 0, now(device)
    while steps < 2 or now(device) - start < 0.5:
        plain.train(1)
        steps += 1
    return (now(device) - start) / steps
