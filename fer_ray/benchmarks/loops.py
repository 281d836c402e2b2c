"""What the benchmark times: the real training loop, the plain one, and how rounds alternate."""

from __future__ import annotations

import contextlib
import itertools
import math
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
from fer_ray.runtime.process import keep_freed_memory
from fer_ray.training.feed import Feed, Images
from fer_ray.training.loop import Trainer
from fer_ray.training.memory_feed import MemoryFeed
from fer_ray.training.process_group import ProcessGroup

EPOCHS = 7
"""Epochs of the real run whose first is compared with the later ones."""

_LEARNING_RATE = 0.001
"""Of every loop: it does not change the speed, and nothing may become infinite."""
_MOST_IMAGES = 2**18
_FLOAT_BYTES = 2**30
"""The most that the plain loop's normalized images may take; it goes through them in a circle."""


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """What one worker measures with."""

    config: TrainConfig
    """Made for measuring by `for_measuring`."""
    info: DatasetInfo
    group: ProcessGroup
    threads: int
    train: Images
    """The whole train split."""
    validation: Images

    @classmethod
    def of(cls, settings: dict[str, Any], *, threads: int | None = None) -> Workplace:
        """Reads the data and sets the threads, in a worker of Ray Train."""
        import ray.train
        import ray.train.torch

        keep_freed_memory()  # as the real worker; the plain loops in this process gain by it too
        config = TrainConfig.from_dict(settings["config"])
        context = ray.train.get_context()
        info = read_info(config.data)
        loaded = (load_split(info, name) for name in ("train", "validation"))
        train, validation = (Images.known(split.images, split.labels) for split in loaded)
        threads = threads or threads_of(config)
        torch.set_num_threads(threads)
        return cls(
            config=config,
            info=info,
            group=ProcessGroup(
                rank=context.get_world_rank(),
                size=context.get_world_size(),
                device=ray.train.torch.get_device(),
            ),
            threads=threads,
            train=train,
            validation=validation,
        )

    def feed(self, steps: int) -> MemoryFeed:
        """An epoch of `steps` steps from memory, and an eighth as many images to validate."""
        count = steps * self.config.schedule.global_batch_size
        validation = spread(self.validation, max(count // 8, self.group.size))
        train = spread(self.train, count)
        return MemoryFeed(self.config, self.info, train, validation, group=self.group)

    def trainer(self, feed: Feed) -> Trainer:
        """The real loop's state."""
        labels: dict[str, Any] = {"run": "benchmark", "environment": {}}
        made = Trainer(self.config, self.info, feed, group=self.group, labels=labels, resume=None)
        made._last_logged = math.inf  # rounds are no epochs of a run: no lines of progress
        return made

    def plain(self, forward: Forward, batch_size: int, steps: int) -> Plain:
        """The plain loop in the real one's precision and layout."""
        batches = float_batches(
            self.train, forward, batch_size=batch_size, steps=steps, device=self.group.device
        )
        return Plain(self.config, self.info, batches, self.group.device, bfloat16=forward.bfloat16)


def threads_of(config: TrainConfig) -> int:
    """Threads of a worker, as in a training run."""
    return config.scaling.threads_per_worker or max(int(config.scaling.cpus_per_worker), 1)


def for_measuring(config: TrainConfig, **schedule: Any) -> TrainConfig:
    """A configuration whose weights stay finite and whose run is as short as it can be."""
    values = config.to_dict()
    values["optimizer"] |= {"learning_rate": _LEARNING_RATE}
    short = {"warmup_epochs": 1.0, "epochs": EPOCHS, "patience": 0, "time_limit_s": 0.0}
    values["schedule"] |= {**short, **schedule}
    return TrainConfig.from_dict(values)


class Plain:
    """The textbook loop on normalized float images: no augmentation, average or clipping."""

    def __init__(
        self,
        config: TrainConfig,
        info: DatasetInfo,
        batches: list[tuple[torch.Tensor, torch.Tensor]],
        device: torch.device,
        *,
        bfloat16: bool,
        channels_last: bool = True,
    ) -> None:
        self.batches, self._bfloat16, self._device = batches, bfloat16, device
        torch.manual_seed(config.schedule.seed)
        model = registry.build(
            config.model, num_classes=len(info.labels), image_size=info.image_size
        )
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self._model = model.to(device, memory_format=layout).train()  # type: ignore[call-overload]
        self._optimizer = torch.optim.SGD(model.parameters(), lr=_LEARNING_RATE, momentum=0.9)

    def train(self, steps: int) -> int:
        """Trains and returns how many images went through."""
        seen = 0
        for images, targets in itertools.islice(itertools.cycle(self.batches), steps):
            self._optimizer.zero_grad()
            with autocast(self._device, self._bfloat16):
                loss = F.cross_entropy(self._model(images), targets)
            loss.backward()
            self._optimizer.step()
            seen += len(images)
        return seen


def autocast(device: torch.device, enabled: bool) -> contextlib.AbstractContextManager:
    """bfloat16 where it is wanted."""
    return torch.autocast(device.type, torch.bfloat16) if enabled else contextlib.nullcontext()


def spread(images: Images, count: int) -> Images:
    """`count` of the images, evenly spread over all, or all of them over and over."""
    num = len(images.labels)
    if count <= num:
        rows = np.linspace(0, num - 1, count).round().astype(np.int64)
    else:
        rows = np.arange(count) % num
    return Images(pixels=images.pixels[rows], labels=images.labels[rows])


def float_batches(
    images: Images, forward: Forward, *, batch_size: int, steps: int, device: torch.device
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Up to `steps` batches, normalized and resized as the network takes them, on the device."""
    side = forward.input_size or images.pixels.shape[1]
    most = max(_FLOAT_BYTES // (4 * side**2 * batch_size), 2)
    chosen = spread(images, batch_size * min(steps, most))
    batches = []
    for start in range(0, len(chosen.labels), batch_size):
        pixels = torch.from_numpy(chosen.pixels[start : start + batch_size]).to(device)
        batch = resize(forward.normalizer(pixels), forward.input_size)
        targets = torch.from_numpy(chosen.labels[start : start + batch_size]).to(device)
        batches.append((batch.contiguous(memory_format=torch.channels_last), targets))
    return batches


def now(device: torch.device) -> float:
    """Seconds of a clock, read when a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def rate(work: Callable[[], int], device: torch.device, at_least_s: float = 0.0) -> float:
    """Images/s of `work`, which returns its images, done again until `at_least_s` are over."""
    start, seen = now(device), 0
    while True:
        seen += work()
        if (elapsed := now(device) - start) >= at_least_s:
            return seen / elapsed


def in_turn(candidates: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Images/s of each round of each candidate, A B A B …, after one round that is not kept."""
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(-1, rounds):
        for name, measured in candidates.items():
            value = measured()
            if number >= 0:
                found[name].append(value)
    return found


def steps_for(step_s: float, round_s: float, batch_size: int) -> int:
    """Steps of a round: about `round_s` seconds, at least 2."""
    most = max(_MOST_IMAGES // batch_size, 2)
    return min(max(round(round_s / step_s), 2), most)


def step_seconds(plain: Plain, device: torch.device) -> float:
    """Seconds of a step of the plain loop, after two steps that are not counted."""
    plain.train(2)
    steps, start = 0, now(device)
    while steps < 2 or now(device) - start < 0.5:
        plain.train(1)
        steps += 1
    return (now(device) - start) / steps
