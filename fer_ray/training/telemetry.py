"""Ray's metrics of one training worker, which Prometheus scrapes with Ray's own.

They live as long as the worker. What outlives the cluster is the run's history.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

import torch

EVERY_S = 10.0
"""Seconds between updates within an epoch; Ray exports metrics at the same interval."""

GAUGES = {
    "fer_ray_train_images_per_s": "training images per second of this rank",
    "fer_ray_train_loss": "training loss, mean over this rank's images, in nats",
    "fer_ray_train_epoch": "current epoch, from 1",
    "fer_ray_device_memory_bytes": "GPU memory reserved; on CPUs, the worker's resident memory",
}
COUNTERS = {
    "fer_ray_train_steps": "steps since the worker started",
    "fer_ray_train_images": "training images of this rank since the worker started",
}
LABELS = ("run", "rank", "device")

_Mark = tuple[float, int]
"""A time, and the number of images trained on until then."""


class Telemetry:
    """A training callback that updates one worker's metrics."""

    def __init__(self, *, run: str, rank: int, device: torch.device) -> None:
        """Registers the metrics; outside of Ray they are discarded.

        Args:
            run: the run's name.
            rank: the worker's number, from 0.
            device: where the worker computes.
        """
        from ray.util.metrics import Counter, Gauge

        self._device = device
        self._gauges = {name: Gauge(name, text, LABELS) for name, text in GAUGES.items()}
        self._counters = {name: Counter(name, text, LABELS) for name, text in COUNTERS.items()}
        for metric in (*self._gauges.values(), *self._counters.values()):
            metric.set_default_tags({"run": run, "rank": str(rank), "device": device.type})
        self._counted = dict.fromkeys(COUNTERS, 0)
        self._steps = self._images = 0
        self._updated_at, self._last_step_at = time.monotonic(), 0.0
        self._epoch_start: _Mark | None = None
        self._last_update: _Mark | None = None

    def on_step(self, epoch: int, step: int, images: int, loss: torch.Tensor) -> None:
        """Counts a step; costs two additions and a clock reading, but for every `EVERY_S`.

        Args:
            epoch: from 1.
            step: of the run, from 1.
            images: number of images that this worker trained on.
            loss: their summed loss, on the device: reading it makes a GPU wait.
        """
        self._steps += 1
        self._images += images
        self._last_step_at = now = time.monotonic()
        if self._epoch_start is None:  # when the epoch's first step began is not known
            self._epoch_start = self._last_update = (now, self._images)
        if now - self._updated_at >= EVERY_S:
            value = float(loss) / max(images, 1)
            self._update(epoch, value, self._images_per_s(self._last_update))

    def on_epoch(self, step: int, row: dict[str, Any]) -> None:
        """Updates the metrics after an epoch.

        Args:
            step: the epoch's last step, of the run, from 1.
            row: the epoch's row of the history.
        """
        self._update(row["epoch"], row["train_loss"], self._images_per_s(self._epoch_start))
        self._epoch_start = None

    def _images_per_s(self, mark: _Mark | None) -> float | None:
        """Images per second from a mark to the last step; None where there was one step only."""
        if mark is None or self._last_step_at <= mark[0]:
            return None
        return (self._images - mark[1]) / (self._last_step_at - mark[0])

    def _update(self, epoch: int, loss: float, images_per_s: float | None) -> None:
        self._updated_at = time.monotonic()
        self._last_update = (self._last_step_at, self._images)
        gauges = {
            "fer_ray_train_images_per_s": images_per_s,
            "fer_ray_train_loss": loss,
            "fer_ray_train_epoch": epoch,
            "fer_ray_device_memory_bytes": device_memory(self._device),
        }
        for name, value in gauges.items():
            if value is not None:
                self._gauges[name].set(value)
        counts = {"fer_ray_train_steps": self._steps, "fer_ray_train_images": self._images}
        for name, count in counts.items():
            if count > self._counted[name]:
                self._counters[name].inc(count - self._counted[name])
                self._counted[name] = count


def device_memory(device: torch.device) -> int:
    """Bytes that this process holds of its GPU, or of the machine's memory without one."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    with contextlib.suppress(OSError):  # an operating system other than Linux
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    return 0
