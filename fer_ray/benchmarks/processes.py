"""Start time and peak memory of processes, from the kernel's files in /proc (Linux)."""

from __future__ import annotations

import contextlib
import os
import resource
import threading
import time
from pathlib import Path

_POLL_S = 0.5
_KIB_PER_MIB = 1024


def started_at() -> float:
    """When this process was started, in seconds since the epoch."""
    fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()  # from the third on
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.time() - age_s


def own_peak_mib() -> float:
    """The largest resident set that this process has had so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _KIB_PER_MIB


class PeakMemory:
    """Follows, while the block runs, the peak memory of a process and of those that it starts.

    Args:
        driver: id of the process.
    """

    def __init__(self, driver: int) -> None:
        self._driver = driver
        self._peaks_kib: dict[int, int] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def peaks_mib(self) -> dict[str, float]:
        """The largest resident sets in MiB, shared memory included: ``driver``, and
        ``largest other process``, of all that the driver started, directly or not."""
        others = [peak for process, peak in self._peaks_kib.items() if process != self._driver]
        peaks = {
            "driver": self._peaks_kib.get(self._driver, 0),
            "largest other process": max(others, default=0),
        }
        return {name: kib / _KIB_PER_MIB for name, kib in peaks.items()}

    def _run(self) -> None:
        while True:
            processes = _parents_and_peaks()
            for process, (_, peak_kib) in processes.items():
                if peak_kib and _descends(process, self._driver, processes):
                    self._peaks_kib[process] = peak_kib
            if self._ended.wait(_POLL_S):
                return


def _parents_and_peaks() -> dict[int, tuple[int, int]]:
    """The parent's id and the peak resident set in KiB (0 for a zombie) of each process.

    The kernel keeps the peak, so that nothing between two looks is missed.
    """
    processes = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # the process ended
                lines = (line.split() for line in (folder / "status").read_text().splitlines())
                fields = {words[0]: words[1] for words in lines if len(words) > 1}
                processes[int(folder.name)] = int(fields["PPid:"]), int(fields.get("VmHWM:", 0))
    return processes


def _descends(process: int, ancestor: int, processes: dict[int, tuple[int, int]]) -> bool:
    while process in processes:
        if process == ancestor:
            return True
        process = processes[process][0]
    return False
