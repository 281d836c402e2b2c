"""What the benchmark's workers measure, one alone or several together; the result is a file."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fer_ray import storage
from fer_ray.benchmarks.input import InputBenchmark, cores
from fer_ray.benchmarks.loops import (
    EPOCHS,
    PlainLoop,
    WorkerContext,
    for_measuring,
    in_turn,
    now,
    rate,
    spread,
    step_seconds,
    steps_for,
    threads_of,
)
from fer_ray.benchmarks.processes import own_peak_mib
from fer_ray.config.schema import TrainConfig
from fer_ray.data.dataset import load_split, read_info
from fer_ray.models import precision
from fer_ray.models.forward import resize
from fer_ray.runtime import environment
from fer_ray.training.feed import Batch, Images, own_part
from fer_ray.training.loop import Trainer
from fer_ray.training.memory_feed import MemoryFeed

RESULT = "measured.json"
"""Name of the file that the first worker writes into its folder."""
_PROFILED_STEPS = 20


def calibrate(values: dict[str, Any]) -> float:
    """Seconds per step of the plain loop, to size the rounds.

    It runs in its own process, so that the measured one starts fresh.

    Args:
        values: the configuration, as `TrainConfig.to_dict` returns it.
    """
    config = TrainConfig.from_dict(values)
    torch.set_num_threads(threads_of(config))
    device = torch.device("cuda" if config.scaling.use_gpu else "cpu")
    info = read_info(config.data)
    split = load_split(info, "train")
    batch_size = config.schedule.global_batch_size
    sample = spread(Images.known(split.images, split.labels), 2 * batch_size)
    images = torch.from_numpy(sample.pixels).float().div(255).unsqueeze(1).to(device)
    images = resize(images, config.model.input_size)
    targets = torch.from_numpy(sample.labels).to(device)
    batches = list(zip(images.split(batch_size), targets.split(batch_size)))
    arithmetic = precision.for_training(config.schedule.precision, config.model, device)
    return step_seconds(PlainLoop(config, info, batches, device, precision=arithmetic), device)


class TimedFeed:
    """A feed that records when the first step ended, in seconds since the epoch."""

    def __init__(self, feed: MemoryFeed, device: torch.device) -> None:
        self._feed, self._device = feed, device
        self.steps_per_epoch, self.class_counts = feed.steps_per_epoch, feed.class_counts
        self.validation, self.histogram = feed.validation, feed.histogram
        self.first_step_at = 0.0

    def train(self, epoch: int) -> Iterator[Batch]:
        """As `MemoryFeed.train`. The loop takes the second batch when its first step has ended."""
        for step, batch in enumerate(self._feed.train(epoch)):
            if step == 1 and not self.first_step_at:
                now(self._device)
                self.first_step_at = time.time()
            yield batch


MEASURED_ALONE = ("train", "epochs", "input", "input_naive", "stream")
"""What `measure_alone` can measure."""
_TRAINING = {"train", "epochs"}


def measure_alone(settings: dict[str, Any]) -> None:
    """Measures one worker: its start, the epochs of a real run, training and input.

    Args:
        settings: ``config``; ``names`` of `MEASURED_ALONE` to measure; ``rounds``; ``round_s``;
            ``step_s``, seconds per step of the plain loop (0 where no training is measured);
            ``spare_cpus`` for streaming; ``default_precision``, whether the configuration leaves
            the precision to the device; ``folder`` for the result.
    """
    entered_at = time.time()
    context = WorkerContext.load(settings)
    names, rounds = settings["names"], settings["rounds"]
    result: dict[str, Any] = {"threads": context.threads, "rounds": {}}
    if _TRAINING & set(names):
        result |= {"entered_at": entered_at, **_measure_training(context, settings, entered_at)}
    if set(names) - _TRAINING:
        result["input_threads"] = cores()
        with InputBenchmark(context, settings) as inputs:
            result["rounds"] |= in_turn(inputs.candidates(names), rounds)
            result["stream_images"] = inputs.stream_images
    result |= environment.describe(context.group.device)
    storage.write_json(storage.join(settings["folder"], RESULT), result)


def _measure_training(
    context: WorkerContext, settings: dict[str, Any], entered_at: float
) -> dict[str, Any]:
    """A real run of `EPOCHS` epochs, then the rounds of each loop where they are asked for."""
    device = context.group.device
    batch_size = context.config.schedule.global_batch_size
    steps = steps_for(settings["step_s"], settings["round_s"], batch_size)
    feed = TimedFeed(context.feed(steps), device)
    loaded_at = time.time()
    trainer = context.trainer(feed)
    built_at = time.time()
    trainer.fit(lambda history, save: None)
    moments = (entered_at, loaded_at, built_at, feed.first_step_at)
    stages = zip(("data", "model", "first_step"), itertools.pairwise(moments))
    result = {
        "steps": steps,
        "epochs_s": [row["seconds"] for row in trainer.history],
        "worker_peak_mib": own_peak_mib(),  # before the loops that a training does not have
        "startup_s": {stage: end - start for stage, (start, end) in stages},
        "rounds": {},
    }
    if "train" in settings["names"]:
        candidates = _training_loops(context, trainer, steps, settings["default_precision"])
        result["rounds"] = in_turn(candidates, settings["rounds"])
    if device.type == "cuda":
        result["gpu_busy_share"] = _gpu_busy_fraction(context, trainer)
    return result


def _training_loops(
    context: WorkerContext, trainer: Trainer, steps: int, default_precision: bool
) -> dict[str, Callable[[], float]]:
    """Functions that time a round of the real loop and of the plain ones, in images/s.

    Where the configuration sets a precision, the real loop in the default one is timed too.
    """
    device, batch_size = context.group.device, context.config.schedule.global_batch_size
    epochs = itertools.count(EPOCHS)

    def real(trainer: Trainer) -> Callable[[], int]:
        def epoch() -> int:
            trainer.train_epoch(next(epochs))
            return trainer.steps_per_epoch * batch_size

        return epoch

    plain = context.plain(trainer.forward, batch_size, steps)
    batches = [(images.contiguous(), targets) for images, targets in plain.batches]
    contiguous = PlainLoop(
        context.config, context.info, batches, device, precision="float32", channels_last=False
    )
    works: dict[str, Callable[[], int]] = {
        "train": real(trainer),
        "train_plain": lambda: plain.train(steps),
        "train_plain_layout": lambda: contiguous.train(steps),
    }
    if not default_precision:
        config = for_measuring(context.config, precision="auto")
        default = replace(context, config=config)
        works["train_default"] = real(default.trainer(context.feed(steps)))
    return {name: functools.partial(rate, work, device) for name, work in works.items()}


def _gpu_busy_fraction(context: WorkerContext, trainer: Trainer) -> float:
    """The fraction of the real loop's time in which the GPU runs kernels, from 0 to 1."""
    from torch.profiler import ProfilerActivity, profile

    trainer.feed = context.feed(_PROFILED_STEPS)
    trainer.steps_per_epoch = _PROFILED_STEPS
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        start = now(context.group.device)
        trainer.train_epoch(2 * EPOCHS)
        elapsed_s = now(context.group.device) - start
    busy_us = sum(event.self_device_time_total for event in profiled.key_averages())
    return busy_us / 1e6 / elapsed_s


def measure_together(settings: dict[str, Any]) -> None:
    """Measures several workers with one thread each: the real loop, then independent plain loops.

    Args:
        settings: ``config``, ``rounds``, ``round_s``, and the ``folder`` for the result.
    """
    context = WorkerContext.load(settings, threads=1)
    group, batch_size = context.group, context.config.schedule.global_batch_size
    own = own_part(context.config, group)
    trainer = context.trainer(context.feed(2))
    plain = context.plain(trainer.forward, own.stop - own.start, 2)
    step_s = group.maximum(step_seconds(plain, group.device))
    steps = steps_for(step_s, settings["round_s"], batch_size)
    trainer.feed, trainer.steps_per_epoch = context.feed(steps), steps
    plain = context.plain(trainer.forward, own.stop - own.start, steps)
    epochs = itertools.count()

    def data_parallel() -> float:
        start = now(group.device)
        trainer.train_epoch(next(epochs))
        return steps * batch_size / group.maximum(now(group.device) - start)

    def independent() -> float:
        group.all_reduce(np.zeros(1))  # a barrier: all begin at the same time
        speed = rate(lambda: plain.train(steps), group.device)
        return float(group.all_reduce(np.array([speed]))[0])

    rounds = in_turn({"workers": data_parallel, "workers_plain": independent}, settings["rounds"])
    if group.rank == 0:
        result = {
            "rounds": rounds,
            "steps_together": steps,
            "batch_per_worker": own.stop - own.start,
            **environment.describe(group.device),
        }
        storage.write_json(storage.join(settings["folder"], RESULT), result)
