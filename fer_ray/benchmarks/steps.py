"""What a training step costs on a device, and how near that is to the device's limits."""

from __future__ import annotations

import itertools
import math
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode  # as PyTorch's "Extending" page has it
from torch.utils.flop_counter import FlopCounterMode

from fer_ray import storage
from fer_ray.benchmarks import peaks, trace
from fer_ray.benchmarks.loops import WorkerContext, for_measuring, now, rate, steps_for
from fer_ray.benchmarks.peaks import Peaks
from fer_ray.benchmarks.workers import RESULT
from fer_ray.runtime import environment
from fer_ray.training.loop import Trainer
from fer_ray.training.memory_feed import MemoryFeed

TRACE = "trace.json"
"""Name of the trace that the worker writes into its folder."""
_WARM_UP_STEPS = 3
_NO_WORK = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"} | {
    *("_unsafe_view", "lift_fresh"),
}
"""Operations that touch no memory, beside views and those that ask for a tensor's properties."""


def measure(settings: dict[str, Any]) -> None:
    """Measures the steps of one worker, in a worker of Ray Train.

    Args:
        settings: ``config``, ``rounds``, ``round_s``, and the ``folder`` for the result and the
            trace.
    """
    context = WorkerContext.load(settings)
    rounds, round_s = settings["rounds"], settings["round_s"]
    path = Path(settings["folder"]) / TRACE
    step = report(context, rounds=rounds, round_s=round_s, path=path)
    result = {"rounds": {}, "step": step, **environment.describe(context.group.device)}
    storage.write_json(storage.join(settings["folder"], RESULT), result)


def report(context: WorkerContext, *, rounds: int, round_s: float, path: Path) -> dict[str, Any]:
    """Times steps, counts what they compute, and profiles some.

    Args:
        context: what the worker measures with.
        rounds: number of rounds whose median is the speed.
        round_s: about the seconds of a round.
        path: file for the trace.

    Returns:
        ``images_per_s``, ``step_s``, ``precision``, what `fractions` and `trace.summarize` return,
        ``validation_s`` of the whole validation split, ``checkpoint_copy_s`` and
        ``checkpoint_write_s`` of a checkpoint on a local disk, and ``peak_gpu_memory_mib``, null
        without a GPU.
    """
    device, config = context.group.device, context.config
    batch_size = config.schedule.global_batch_size
    steps = _Steps(context)
    speed = steps.speed(rounds, round_s)
    flops, num_bytes = steps.counts()
    steps.profile(path)
    step_s = batch_size / speed
    summary = trace.summarize(trace.read(path))
    precision = steps.trainer.forward.precision
    return {
        "images_per_s": speed,
        "step_s": step_s,
        "precision": precision,
        **fractions(flops, num_bytes, step_s, precision=precision, limits=peaks.of(device)),
        # the profiler slows the host down, but not what the GPU does
        "device_busy": None if summary["gpu_ms"] is None else summary["gpu_ms"] / 1e3 / step_s,
        **summary,
        **steps.pauses(),
        "peak_gpu_memory_mib": (
            torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
        ),
    }


def fractions(
    flops: int, num_bytes: int, step_s: float, *, precision: str, limits: Peaks | None
) -> dict[str, Any]:
    """What a step computes and moves, beside the most that the device could in the same time.

    Args:
        flops: of a step.
        num_bytes: that a step reads and writes.
        step_s: seconds of a step.
        precision: the arithmetic, one of `precision.ORDER`.
        limits: of the device; None: not known.

    Returns:
        ``flops_per_step``, ``bytes_per_step``, and ``fraction_of_peak_flops``,
        ``fraction_of_bandwidth`` and ``peaks``, which are null where the limits are not known.
    """
    peak_flops = limits.flops.get(precision) if limits else None
    return {
        "flops_per_step": flops,
        "fraction_of_peak_flops": flops / step_s / peak_flops if peak_flops else None,
        "bytes_per_step": num_bytes,
        "fraction_of_bandwidth": num_bytes / step_s / limits.bytes_per_s if limits else None,
        "peaks": vars(limits) if limits else None,
    }


class _Steps:
    """The real training loop, for epochs of any number of steps."""

    def __init__(self, context: WorkerContext) -> None:
        self._context, self._epochs = context, itertools.count()
        self.trainer: Trainer = context.trainer(context.feed(_WARM_UP_STEPS))
        self._epoch()
        self.trainer.evaluate()

    def _epoch(self, steps: int | None = None) -> int:
        """Trains an epoch of `steps` steps, or as many as before; returns the images."""
        if steps is not None:
            self.trainer.feed, self.trainer.steps_per_epoch = self._context.feed(steps), steps
        self.trainer.train_epoch(next(self._epochs))
        return self.trainer.steps_per_epoch * self._context.config.schedule.global_batch_size

    def speed(self, rounds: int, round_s: float) -> float:
        """Images/s: the median of some rounds."""
        device = self._context.group.device
        start = now(device)
        self._epoch()
        step_s = (now(device) - start) / _WARM_UP_STEPS
        steps = steps_for(step_s, round_s, self._context.config.schedule.global_batch_size)
        self._epoch(steps)
        return statistics.median(rate(self._epoch, device) for _ in range(rounds))

    def counts(self) -> tuple[int, int]:
        """FLOPs of a step's convolutions and matrix products, and the bytes that it moves.

        They are those of the network as it is written: a compiled one hides its operations.
        """
        context = self._context
        config = for_measuring(context.config, compile="off")
        trainer = replace(context, config=config).trainer(context.feed(1))
        flops, moved = FlopCounterMode(display=False), ByteCounter(context.group.device)
        with flops, moved:
            trainer.train_epoch(0)
        return flops.get_total_flops(), moved.num_bytes

    def profile(self, path: Path) -> None:
        """Writes a trace of some steps."""
        steps = trace.STEPS_TO_RUN
        self.trainer.feed, self.trainer.steps_per_epoch = self._context.feed(steps), steps
        trace.record(self.trainer, next(self._epochs), path)

    def pauses(self) -> dict[str, float]:
        """Seconds between two epochs; a checkpoint is written beside the training."""
        context, device = self._context, self._context.group.device
        images = (context.train, context.validation)
        self.trainer.feed = MemoryFeed(context.config, context.info, *images, group=context.group)
        start = now(device)
        self.trainer.evaluate()
        validated = now(device)
        write = self.trainer.snapshot()
        copied = now(device)
        with tempfile.TemporaryDirectory() as folder:
            writing = now(device)
            write(Path(folder))
            written = now(device)
        return {
            "validation_s": validated - start,
            "checkpoint_copy_s": copied - validated,
            "checkpoint_write_s": written - writing,
        }


class ByteCounter(TorchDispatchMode):
    """Counts the bytes that operations move in a device's memory.

    Each operation is taken to read its inputs and to write its results once: less than a kernel
    that reads an input repeatedly, more than one whose input is still in a cache.

    Args:
        device: whose tensors are counted.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self.num_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        namespace, name = function._schema.name.split("::")
        if not function.is_view and namespace != "prim" and name not in _NO_WORK:
            self.num_bytes += self._size(args) + self._size(kwargs) + self._size(result)
        return result

    def _size(self, value: Any) -> int:
        """Bytes of all tensors on the device; a dimension that is only expanded counts once."""
        if isinstance(value, dict):
            return self._size(list(value.values()))
        if isinstance(value, list | tuple):
            return sum(map(self._size, value))
        if not isinstance(value, torch.Tensor) or value.device.type != self._device.type:
            return 0
        if not value.numel():
            return 0
        sizes = (size for size, stride in zip(value.shape, value.stride()) if stride)
        return math.prod(sizes) * value.element_size()
