"""What a worker tells of its training: lines of JSON in the run's folder, and Ray's metrics.

``<run>/logs/<start>-rank-<rank>.jsonl`` has a line when the worker starts and ends, after each
epoch, and every `EVERY_S` within long ones; each sitting of a worker has a file of its own. They
outlive the cluster. The metrics live as long as the worker, where Prometheus finds Ray's own.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from fer_ray import storage

EVERY_S = 10.0
"""Seconds between lines within an epoch; Ray hands metrics on as often."""

FOLDER = "logs"
"""Where the lines lie, below the run's folder."""

FIELDS = (
    *("time", "run", "rank", "node", "event", "epoch", "step", "loss", "images_per_s"),
    *("device_memory_bytes", "message"),
)
"""The keys of every line."""

GAUGES = {
    "fer_ray_train_images_per_s": "training images a second, of this rank",
    "fer_ray_train_loss": "what training minimizes, mean of this rank's images, nats",
    "fer_ray_train_epoch": "the epoch that is trained, from 1",
    "fer_ray_device_memory_bytes": "held of the GPU; on CPUs, the worker's resident memory",
}
COUNTERS = {
    "fer_ray_train_steps": "steps, since the worker started",
    "fer_ray_train_images": "training images of this rank, since the worker started",
}
LABELS = ("run", "rank", "device")

_UPLOAD_S = 60.0
"""Seconds between copies of the lines to an object store, where nothing can be appended."""


class Telemetry:
    """One worker's lines and metrics: a context, which notes how the work ends."""

    def __init__(self, *, run: str, rank: int, folder: str, device: torch.device) -> None:
        """Nothing is written before the context is entered.

        Args:
            run: the run's name.
            rank: the worker's.
            folder: the run's; a local path or a URI.
            device: where the worker computes.
        """
        self._device = device
        self._around = {"run": run, "rank": rank, "node": socket.gethostname()}
        started = datetime.datetime.now(datetime.UTC)
        name = f"{started:%Y%m%dT%H%M%S.%f}-rank-{rank:05d}.jsonl"
        self._lines = _Lines(storage.join(folder, FOLDER, name))
        self._metrics = _Metrics({"run": run, "rank": str(rank), "device": device.type})
        self._steps = self._images = 0
        self._told_at, self._last = time.monotonic(), 0.0
        self._epoch_from: _Mark | None = None
        self._told_from: _Mark | None = None

    def __enter__(self) -> Telemetry:
        self._write("start")
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self._write("end")
        else:
            self._write("failed", message=f"{type(error).__name__}: {error}".splitlines()[0])
        self._lines.close()

    def on_step(self, epoch: int, step: int, images: int, loss: torch.Tensor) -> None:
        """Notes a step: two additions and a look at the clock, but for every `EVERY_S`.

        Args:
            epoch: from 1.
            step: of the run, from 1.
            images: how many of them this worker trained on.
            loss: their sum, on the device: reading it makes a GPU wait.
        """
        self._steps += 1
        self._images += images
        self._last = now = time.monotonic()
        if self._epoch_from is None:  # when an epoch's first step began is not known
            self._epoch_from = self._told_from = (now, self._images)
        if now - self._told_at >= EVERY_S:
            value = float(loss) / max(images, 1)
            self._tell("step", epoch, step, value, self._speed_since(self._told_from))

    def on_epoch(self, step: int, row: dict[str, Any]) -> None:
        """Notes that an epoch is trained and validated.

        Args:
            step: its last one, of the run, from 1.
            row: of the history.
        """
        speed = self._speed_since(self._epoch_from)
        self._tell("epoch", row["epoch"], step, row["train_loss"], speed)
        self._epoch_from = None

    def _speed_since(self, mark: _Mark | None) -> float | None:
        """This worker's images a second up to its last step; None where there was but one."""
        if mark is None or self._last <= mark[0]:
            return None
        return (self._images - mark[1]) / (self._last - mark[0])

    def _tell(self, event: str, epoch: int, step: int, loss: float, speed: float | None) -> None:
        self._told_at = time.monotonic()
        self._told_from = (self._last, self._images)
        memory = device_memory(self._device)
        gauges = {
            "fer_ray_train_images_per_s": speed,
            "fer_ray_train_loss": loss,
            "fer_ray_train_epoch": epoch,
            "fer_ray_device_memory_bytes": memory,
        }
        counts = {"fer_ray_train_steps": self._steps, "fer_ray_train_images": self._images}
        self._metrics.set(gauges, counts)
        self._write(
            event,
            epoch=epoch,
            step=step,
            loss=loss if math.isfinite(loss) else None,  # JSON has no other numbers
            images_per_s=speed,
            device_memory_bytes=memory,
        )

    def _write(self, event: str, **values: Any) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        line = {"time": now.replace("+00:00", "Z"), **self._around, "event": event, **values}
        self._lines.add(json.dumps({name: line.get(name) for name in FIELDS}, ensure_ascii=False))


_Mark = tuple[float, int]
"""A time, and the images that were trained on by then."""


def device_memory(device: torch.device) -> int:
    """Bytes that this process holds of its GPU, or of the machine's memory without one."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    with contextlib.suppress(OSError):  # another system than Linux
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    return 0


class _Metrics:
    """Ray's metrics of one worker; outside of Ray they lead nowhere."""

    def __init__(self, labels: dict[str, str]) -> None:
        from ray.util.metrics import Counter, Gauge

        self._gauges = {name: Gauge(name, about, LABELS) for name, about in GAUGES.items()}
        self._counters = {name: Counter(name, about, LABELS) for name, about in COUNTERS.items()}
        self._counted = dict.fromkeys(COUNTERS, 0)
        for metric in (*self._gauges.values(), *self._counters.values()):
            metric.set_default_tags(labels)

    def set(self, gauges: dict[str, float | None], counts: dict[str, int]) -> None:
        """Sets what is known, and raises the counters to what they are now."""
        for name, value in gauges.items():
            if value is not None:
                self._gauges[name].set(value)
        for name, count in counts.items():
            if count > self._counted[name]:
                self._counters[name].inc(count - self._counted[name])
                self._counted[name] = count


class _Lines:
    """A file of lines that a thread of its own writes: slow storage holds no training up.

    Nor does storage that fails: what cannot be written is kept for the next time.
    """

    def __init__(self, path: str) -> None:
        self._place = path
        self._waiting: list[str] = []
        self._uploaded: list[str] = []
        self._uploaded_at = -math.inf
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="telemetry")

    def add(self, line: str) -> None:
        """Has a line written."""
        self._waiting.append(line)
        self._thread.submit(self._write, False)

    def close(self) -> None:
        """Has the rest written, and waits for it."""
        self._thread.submit(self._write, True)
        self._thread.shutdown()

    def _write(self, everything: bool) -> None:
        lines = list(self._waiting)
        with contextlib.suppress(OSError):
            if not storage.is_uri(self._place):
                path = Path(self._place)
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a") as file:
                    file.writelines(f"{line}\n" for line in lines)
            elif everything or time.monotonic() - self._uploaded_at >= _UPLOAD_S:
                text = "".join(f"{line}\n" for line in (*self._uploaded, *lines))
                storage.write_bytes(self._place, text.encode())
                self._uploaded += lines
                self._uploaded_at = time.monotonic()
            else:
                return
            del self._waiting[: len(lines)]
