"""A profile of training steps, as a trace that Perfetto opens, and what it shows of a GPU."""

from __future__ import annotations

import collections
import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from fer_ray import storage
from fer_ray.models.forward import Forward
from fer_ray.training.feed import Batch, Feed
from fer_ray.training.loop import Trainer
from fer_ray.transforms.mixing import Mix

STEPS = 10
"""Number of profiled steps."""
STEPS_TO_RUN = STEPS + 2
"""Steps of the epoch of which `STEPS` are profiled: the first starts the profiler, and after the
last the loop reads the epoch's sums."""

RANGES = ("input", "forward", "backward", "optimizer")
"""Names of the parts of a step; ``optimizer`` stands for PyTorch's own range of it."""
_OPTIMIZER = "Optimizer.step#"

_CALLS = {"cuda_runtime", "cuda_driver"}
_WORK = {"kernel", "gpu_memcpy", "gpu_memset"}
"""Categories of a trace: calls of the host, and what a GPU does for them."""
_BLOCKING_CALLS = {"cudaMemcpy", "cudaMemcpy2D", "cudaMemset", "cudaFree"}
"""Calls that wait for the GPU, beside those whose names end in ``Synchronize``."""
_TOP_KERNELS = 10


class _NamedFeed:
    """A feed whose batches are waited for in a named range."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self.steps_per_epoch, self.class_counts = feed.steps_per_epoch, feed.class_counts
        self.validation, self.histogram = feed.validation, feed.histogram

    def train(self, epoch: int) -> Iterator[Batch]:
        """As `Feed.train`."""
        batches = iter(self._feed.train(epoch))
        while True:
            with record_function("input"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch


class _NamedForward(Forward):
    """A forward pass in a named range."""

    def logits(
        self, model: torch.nn.Module, images: torch.Tensor, mix: Mix | None = None
    ) -> torch.Tensor:
        """As `Forward.logits`."""
        with record_function("forward"):
            return super().logits(model, images, mix)


@contextlib.contextmanager
def _named_ranges(trainer: Trainer) -> Iterator[None]:
    """Names the parts of a trainer's steps in a profile, while the block runs.

    Nothing in the loop announces its backward pass, so that `Tensor.backward` itself is replaced:
    in a process that measures and in nothing else.
    """
    feed, forward, backward = trainer.feed, trainer.forward, torch.Tensor.backward

    def named(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        with record_function("backward"):
            backward(tensor, *args, **kwargs)

    trainer.feed, trainer.forward = _NamedFeed(feed), _NamedForward(**vars(forward))
    torch.Tensor.backward = named  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        trainer.feed, trainer.forward = feed, forward
        torch.Tensor.backward = backward  # type: ignore[method-assign]


class _EachStep:
    """A callback that tells a profiler where a step ends."""

    def __init__(self, profiler: profile) -> None:
        self._profiler = profiler

    def on_step(self, epoch: int, step: int, images: int, loss: torch.Tensor) -> None:
        """As `Callback.on_step`."""
        self._profiler.step()

    def on_epoch(self, step: int, row: dict[str, Any]) -> None:
        """As `Callback.on_epoch`."""


def record(trainer: Trainer, epoch: int, path: Path) -> None:
    """Trains one epoch of `STEPS_TO_RUN` steps and writes the profile of `STEPS` of them.

    Args:
        trainer: whose feed has as many steps.
        epoch: the epoch's number, from 0.
        path: the file to write: JSON in the format of Chrome's traces, which Perfetto opens.
    """
    assert trainer.steps_per_epoch == STEPS_TO_RUN
    # Kineto writes notes and an error about a missing GPU to standard error
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [ProfilerActivity.CPU]
    if trainer.group.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    profiler = profile(
        activities=activities,
        schedule=schedule(wait=0, warmup=1, active=STEPS, repeat=1),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
    )
    with _named_ranges(trainer), profiler:
        trainer.callback = _EachStep(profiler)
        trainer.train_epoch(epoch)
        trainer.callback = None


def read(path: Path) -> list[dict[str, Any]]:
    """The events of a trace that `record` wrote."""
    return storage.read_json(str(path))["traceEvents"]


def summarize(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What a trace shows of its steps; all numbers are means over the steps.

    Args:
        events: of a trace from `record`.

    Returns:
        ``profiled_steps``; ``range_ms``, the host's milliseconds in each of `RANGES`; and, null
        where no GPU was used: ``kernels``, their number; ``gpu_ms``, milliseconds in which the GPU
        computes or copies; ``host_synchronizations``, the number of calls that wait for the GPU,
        and ``synchronizing_calls``, their names; ``pageable_copies``, the number of copies from or
        to memory that is not pinned, which the host waits for, too; ``top_kernels``, the longest.
    """
    complete = [event for event in events if event.get("ph") == "X"]
    named = [event for event in complete if event.get("cat") == "user_annotation"]
    steps = [event for event in named if event["name"].startswith("ProfilerStep#")]
    start, end = min(map(_start, steps)), max(map(_end, steps))
    inside = [event for event in complete if start <= _start(event) < end]
    calls = [event for event in inside if event.get("cat") in _CALLS]
    # a GPU works after its calls: also after the last step
    numbers = {event["args"]["correlation"] for event in calls if "correlation" in event["args"]}
    work = [
        event
        for event in complete
        if event.get("cat") in _WORK and event["args"].get("correlation") in numbers
    ]
    result: dict[str, Any] = {
        "profiled_steps": len(steps),
        "range_ms": {name: _range_ms(named, name, start, end) / len(steps) for name in RANGES},
    }
    on_gpu = _gpu_summary(calls, work, len(steps)) if work else dict.fromkeys(_GPU_KEYS)
    return result | on_gpu


_GPU_KEYS = (
    "kernels",
    "gpu_ms",
    "host_synchronizations",
    "synchronizing_calls",
    "pageable_copies",
    "top_kernels",
)


def _gpu_summary(
    calls: list[Mapping[str, Any]], work: list[Mapping[str, Any]], steps: int
) -> dict[str, Any]:
    waits = collections.Counter(
        event["name"]
        for event in calls
        if event["name"].endswith("Synchronize") or event["name"] in _BLOCKING_CALLS
    )
    kernels = [event for event in work if event["cat"] == "kernel"]
    return {
        "kernels": len(kernels) / steps,
        "gpu_ms": _covered_us(work) / 1e3 / steps,
        "host_synchronizations": waits.total() / steps,
        "synchronizing_calls": {name: count / steps for name, count in waits.items()},
        "pageable_copies": sum("Pageable" in event["name"] for event in work) / steps,
        "top_kernels": _top(kernels, steps),
    }


def _top(kernels: list[Mapping[str, Any]], steps: int) -> list[dict[str, Any]]:
    """The kernels that take most of the time, the longest first."""
    durations: dict[str, list[float]] = collections.defaultdict(list)
    for event in kernels:
        durations[event["name"]].append(event["dur"])
    order = sorted(durations, key=lambda name: -sum(durations[name]))[:_TOP_KERNELS]
    return [
        {
            "name": name,
            "ms": sum(durations[name]) / 1e3 / steps,
            "calls": len(durations[name]) / steps,
        }
        for name in order
    ]


def _start(event: Mapping[str, Any]) -> float:
    return event["ts"]


def _end(event: Mapping[str, Any]) -> float:
    return event["ts"] + event["dur"]


def _range_ms(named: list[Mapping[str, Any]], name: str, start: float, end: float) -> float:
    """Milliseconds of all ranges of a name that begin within a time."""
    prefix = _OPTIMIZER if name == "optimizer" else name
    ranges = (
        event
        for event in named
        if start <= _start(event) < end
        and (event["name"] == name or (prefix != name and event["name"].startswith(prefix)))
    )
    return sum(event["dur"] for event in ranges) / 1e3


def _covered_us(work: list[Mapping[str, Any]]) -> float:
    """Microseconds in which at least one of the events goes on: streams overlap."""
    covered, until = 0.0, float("-inf")
    for event in sorted(work, key=_start):
        covered += max(_end(event) - max(_start(event), until), 0.0)
        until = max(until, _end(event))
    return covered
