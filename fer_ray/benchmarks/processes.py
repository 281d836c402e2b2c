"""The processes of a Ray session on this machine, from /proc: what they are, cost and hold."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

DRIVER, WORKER = "driver", "training worker"
OUR_KINDS = (DRIVER, WORKER, "data loader", "prediction actor", "other task or actor")
"""The kinds that run this project's code; the others are Ray's own."""

_TITLES = {
    "ray::IDLE": "idle worker",
    "ray::DashboardAgent": "agent",
    "ray::RuntimeEnvAgent": "agent",
    "ray::TrainController": "train controller",
    "ray::RayTrainWorker": WORKER,
    "ray::MapWorker": "prediction actor",
    "ray::": "other task or actor",
}
_FILES = {
    "gcs/gcs_server": "gcs_server",
    "raylet/raylet": "raylet",
    "dashboard/dashboard.py": "dashboard",
    "autoscaler/_private/monitor.py": "autoscaler",
    "_private/log_monitor.py": "log monitor",
    "workers/default_worker.py": "idle worker",
}
_POLL_S = 1.0
_MIB = 2**20


def started_at() -> float:
    """When this process was started, in seconds since the epoch."""
    ticks = int(_stat(os.getpid())[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age


def kinds(session: str) -> dict[int, str]:
    """What each process of a Ray session is, by its id: Ray's own, workers, and this driver.

    Args:
        session: the session's name; Ray names its folder on its servers' command lines.
    """
    lines, parents = {}, {}
    for process in _all():
        with contextlib.suppress(OSError):
            lines[process], parents[process] = _command_line(process), int(_stat(process)[1])
    found: dict[int, str] = {os.getpid(): DRIVER}
    roots = {p for p, line in lines.items() if session in line and _kind(line) in _FILES.values()}
    for process, line in lines.items():
        if process == os.getpid() and not line.startswith("ray::"):
            continue
        if (root := _root(process, roots, parents)) is not None:
            kind = _kind(line)
            if kind == WORKER and _kind(lines.get(parents[process], "")) == WORKER:
                kind = "data loader"  # forked by a worker: it has its title
            found[process] = kind or _kind(lines[root]) or "other"
    return found


def started_by(ancestor: int) -> dict[int, str]:
    """What a process and all that it started are, by their ids; it is the driver.

    Args:
        ancestor: its id.
    """
    lines, parents = {}, {}
    for process in _all():
        with contextlib.suppress(OSError):
            lines[process], parents[process] = _command_line(process), int(_stat(process)[1])
    own = {p: line for p, line in lines.items() if _root(p, {ancestor}, parents) is not None}
    return {p: DRIVER if p == ancestor else _kind(line) or "other" for p, line in own.items()}


def cpu_seconds(session: str) -> dict[str, float]:
    """CPU seconds that the living processes of each kind have used so far."""
    used: dict[str, float] = defaultdict(float)
    for process, kind in kinds(session).items():
        with contextlib.suppress(OSError):
            user, system = _stat(process)[11:13]
            used[kind] += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return dict(used)


def is_rays_own(kind: str) -> bool:
    """Whether a kind of process is Ray's machinery, not this project's code."""
    return kind not in OUR_KINDS


class Callback:
    """Notes, while it runs, the most memory that a process of each kind has held.

    Args:
        look: gives the processes to watch, and the kind of each.
    """

    def __init__(self, look: Callable[[], dict[int, str]]) -> None:
        self._kinds = look
        self._peaks: dict[int, tuple[str, float]] = {}
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Callback:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ends.set()
        self._thread.join()

    def peaks_mib(self) -> dict[str, float]:
        """The largest resident set of one process of each kind in MiB, shared memory included."""
        self._look()
        largest: dict[str, float] = {}
        for kind, peak in self._peaks.values():
            largest[kind] = max(peak, largest.get(kind, 0.0))
        return dict(sorted(largest.items()))

    def _run(self) -> None:
        while not self._ends.wait(_POLL_S):
            self._look()

    def _look(self) -> None:
        for process, kind in self._kinds().items():
            with contextlib.suppress(OSError, IndexError):  # gone, or a zombie: it holds nothing
                # the kernel keeps the peak: nothing between two looks is missed
                text = Path(f"/proc/{process}/status").read_text()
                peak = int(text.split("VmHWM:")[1].split()[0]) * 1024 / _MIB
                self._peaks[process] = (kind, peak)


def _all() -> Iterator[int]:
    return (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())


def _stat(process: int) -> list[str]:
    """The fields of /proc/<id>/stat from the third on (state, parent, …)."""
    return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()


def _command_line(process: int) -> str:
    content = Path(f"/proc/{process}/cmdline").read_bytes()
    return content.replace(b"\0", b" ").decode(errors="replace").strip()


def _kind(line: str) -> str | None:
    for beginning, kind in _TITLES.items():
        if line.startswith(beginning):
            return kind
    for part, kind in _FILES.items():
        if f"{part} " in f"{line} ":
            return kind
    return None


def _root(process: int, roots: set[int], parents: dict[int, int]) -> int | None:
    """The nearest of `roots` among a process and those above it."""
    while process in parents:
        if process in roots:
            return process
        process = parents[process]
    return None
