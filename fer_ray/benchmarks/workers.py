"""What the benchmark's workers do: one measures alone, several together; results go into a file."""

from __future__ import annotations

import functools
import itertools
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from fer_ray import storage
from fer_ray.benchmarks import input as benchmark_input
from fer_ray.benchmarks import processes
from fer_ray.benchmarks.loops import (
    EPOCHS,
    Plain,
    Workplace,
    for_measuring,
    in_turn,
    now,
    rate,
    spread,
    step_seconds,
    steps_for,
    threads_of,
)
from fer_ray.config.schema import TrainConfig
from fer_ray.data.dataset import load_split, read_info
from fer_ray.models import registry
from fer_ray.models.forward import resize
from fer_ray.runtime import environment
from fer_ray.training.feed import Batch, Images
from fer_ray.training.loop import Trainer
from fer_ray.training.memory_feed import MemoryFeed
from fer_ray.training.process_group import ProcessGroup

RESULT = "measured.json"
_PROFILED_STEPS = 20


def calibrate(values: dict[str, Any]) -> float:
    """Seconds of a step, in a process of its own: the measured one has to be fresh.

    Args:
        values: the configuration, `TrainConfig.to_dict`.
    """
    config = TrainConfig.from_dict(values)
    torch.set_num_threads(threads_of(config))
    device = torch.device("cuda" if config.scaling.use_gpu else "cpu")
    info = read_info(config.data)
    split = load_split(info, "train")
    batch_size = config.schedule.global_batch_size
    chosen = spread(Images.known(split.images, split.labels), 2 * batch_size)
    images = torch.from_numpy(chosen.pixels).float().div(255).unsqueeze(1).to(device)
    images = resize(images, config.model.input_size)
    targets = torch.from_numpy(chosen.labels).to(device)
    batches = list(zip(images.split(batch_size), targets.split(batch_size)))
    precision = config.schedule.precision
    bfloat16 = precision == "bfloat16" or (
        precision == "auto" and registry.prefers_bfloat16(config.model, device)
    )
    return step_seconds(Plain(config, info, batches, device, bfloat16=bfloat16), device)


class WatchedFeed:
    """A feed that notes when the first step of all was done."""

    def __init__(self, feed: MemoryFeed, device: torch.device) -> None:
        self._feed, self._device = feed, device
        self.steps_per_epoch, self.class_counts = feed.steps_per_epoch, feed.class_counts
        self.validation, self.histogram = feed.validation, feed.histogram
        self.first_step_at = 0.0

    def train(self, epoch: int) -> Iterator[Batch]:
        """As `MemoryFeed.train`; the second batch is asked for when the first step is done."""
        for step, batch in enumerate(self._feed.train(epoch)):
            if step == 1 and not self.first_step_at:
                now(self._device)
                self.first_step_at = time.time()
            yield batch


MEASURED = ("train", "epochs", "input", "input_naive", "stream")
"""What `alone` can measure."""


def alone(settings: dict[str, Any]) -> None:
    """What one worker measures: its start, the epochs of a real run, training, input.

    Args:
        settings: ``config``, ``names`` of what to measure, ``rounds``, ``round_s``, ``step_s``
            of the plain loop (0 where no training is measured), ``spare_cpus`` to stream with,
            and the ``folder`` for the result.
    """
    entered = time.time()
    path = Workplace.of(settings)
    names, rounds, device = settings["names"], settings["rounds"], path.group.device
    round_s, batch_size = settings["round_s"], path.config.schedule.global_batch_size
    found: dict[str, Any] = {"threads": path.threads, "rounds": {}}
    if {"epochs", "train"} & set(names):
        steps = found["steps"] = steps_for(settings["step_s"], round_s, batch_size)
        feed = WatchedFeed(path.feed(steps), device)
        loaded = time.time()
        trainer = path.trainer(feed)
        built = time.time()
        trainer.fit(lambda history, save: None)
        found["epochs_s"] = [row["seconds"] for row in trainer.history]
        found["entered_at"] = entered
        # before the loops that a training does not have: 1024 bytes a unit on Linux
        found["epochs_peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        moments = (entered, loaded, built, feed.first_step_at)
        parts = (after - before for before, after in itertools.pairwise(moments))
        found["startup_s"] = dict(zip(("data", "model", "first_step"), parts))
        if "train" in names:
            candidates = _training(path, trainer, steps, settings["default_precision"])
            found["rounds"] |= in_turn(candidates, rounds)
        if device.type == "cuda":
            found["gpu_busy_share"] = _gpu_busy_share(path, trainer)
    if {"input", "input_naive", "stream"} & set(names):
        found |= {"input_threads": benchmark_input.cores()}
        with benchmark_input.Inputs(path, settings) as inputs:
            found["rounds"] |= in_turn(inputs.candidates(names), rounds)
            found["stream_images"] = inputs.stream_images
    found |= environment.describe(device)
    storage.write_json(storage.join(settings["folder"], RESULT), found)


def _training(
    path: Workplace, trainer: Trainer, steps: int, default_precision: bool
) -> dict[str, Callable[[], float]]:
    """The real loop and the plain ones; the default's own where another precision was given."""
    device, batch_size = path.group.device, path.config.schedule.global_batch_size
    epochs = itertools.count(EPOCHS)

    def real(one: Trainer) -> Callable[[], int]:
        def epoch() -> int:
            one._train_epoch(next(epochs))
            return one.steps_per_epoch * batch_size

        return epoch

    plain = path.plain(trainer.forward, batch_size, steps)
    batches = [(images.contiguous(), targets) for images, targets in plain.batches]
    eager = Plain(path.config, path.info, batches, device, bfloat16=False, channels_last=False)
    works: dict[str, Callable[[], int]] = {
        "train": real(trainer),
        "train_plain": lambda: plain.train(steps),
        "train_plain_layout": lambda: eager.train(steps),
    }
    if not default_precision:
        config = for_measuring(path.config, precision="auto")
        other = Workplace(**{**vars(path), "config": config})
        works["train_default"] = real(other.trainer(path.feed(steps)))
    return {name: functools.partial(rate, work, device) for name, work in works.items()}


def _gpu_busy_share(path: Workplace, trainer: Trainer) -> float:
    """The share of the real loop's time in which the GPU runs kernels, of 1.0."""
    from torch.profiler import ProfilerActivity, profile

    trainer.feed = path.feed(_PROFILED_STEPS)
    trainer.steps_per_epoch = _PROFILED_STEPS
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        start = now(path.group.device)
        trainer._train_epoch(2 * EPOCHS)
        elapsed_s = now(path.group.device) - start
    busy_us = sum(event.self_device_time_total for event in profiled.key_averages())
    return busy_us / 1e6 / elapsed_s


def together(settings: dict[str, Any]) -> None:
    """What several workers of one thread measure: the real loop over all, then each its own.

    Args:
        settings: as of `alone`, and the ``session`` of Ray.
    """
    path = Workplace.of(settings, threads=1)
    group, batch_size = path.group, path.config.schedule.global_batch_size
    own = group.shard(batch_size)
    trainer = path.trainer(path.feed(2))
    plain = path.plain(trainer.forward, own.stop - own.start, 2)
    step_s = group.maximum(step_seconds(plain, group.device))
    steps = steps_for(step_s, settings["round_s"], batch_size)
    trainer.feed, trainer.steps_per_epoch = path.feed(steps), steps
    plain = path.plain(trainer.forward, own.stop - own.start, steps)
    epochs = itertools.count()
    used: list[dict[str, float]] = []

    def real() -> float:
        before = _cpu_seconds(settings, group)
        start = now(group.device)
        trainer._train_epoch(next(epochs))
        seconds = group.maximum(now(group.device) - start)
        after = _cpu_seconds(settings, group)
        spent = {kind: after[kind] - before.get(kind, 0.0) for kind in after}
        used.append({"seconds": seconds, **spent})
        return steps * batch_size / seconds

    def apart() -> float:
        group.all_reduce(np.zeros(1))  # a barrier: they begin together
        return float(
            group.all_reduce(np.array([rate(lambda: plain.train(steps), group.device)]))[0]
        )

    rounds = in_turn({"workers": real, "workers_plain": apart}, settings["rounds"])
    if group.rank == 0:
        found = {"rounds": rounds, "steps": steps, "batch_per_worker": own.stop - own.start}
        found["ray_cpu_s"] = _median_use(used[1:])
        found |= environment.describe(group.device)
        storage.write_json(storage.join(settings["folder"], RESULT), found)


def _cpu_seconds(settings: dict[str, Any], group: ProcessGroup) -> dict[str, float]:
    """CPU seconds so far of each kind of Ray's own processes, seen by the first worker."""
    found = processes.cpu_seconds(settings["session"]) if group.rank == 0 else {}
    group.all_reduce(np.zeros(1))  # nobody starts before the first worker has looked
    return {kind: s for kind, s in found.items() if processes.is_rays_own(kind)}


def _median_use(used: list[dict[str, float]]) -> dict[str, float]:
    """The median round's CPU seconds of each kind."""
    kinds = sorted({kind for one in used for kind in one})
    return {kind: statistics.median(one.get(kind, 0.0) for one in used) for kind in kinds}
