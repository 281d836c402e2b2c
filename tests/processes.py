"""Finding, killing and waiting for the processes that a test started, and no others."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path


def descends(process: int, ancestor: int) -> bool:
    """Whether a process is another, or was started by it or by its descendants."""
    while process > 1:
        if process == ancestor:
            return True
        try:
            status = Path(f"/proc/{process}/status").read_text()
        except OSError:
            return False
        process = int(status.split("PPid:")[1].split()[0])
    return False


def descendants(ancestor: int, title: str = "") -> list[int]:
    """Ids of a process and all that descend from it, whose command line begins with `title`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            name = (process / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if name.startswith(title) and descends(int(process.name), ancestor):
            found.append(int(process.name))
    return sorted(found)


def kill_with_descendants(started: subprocess.Popen) -> None:
    """Kills a job and its whole cluster at once."""
    for process in descendants(started.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    started.wait()


@contextlib.contextmanager
def killing(title: str, when: Callable[[], object], most: int | None = None) -> Iterator[list[int]]:
    """Kills descendants of this process once something has come about while the block runs.

    Args:
        title: what their command lines begin with.
        when: asked again and again.
        most: how many of them; None for all.
    """
    killed: list[int] = []
    over = threading.Event()

    def kill() -> None:
        while not when():
            if over.wait(0.02):
                return
        for process in descendants(os.getpid(), title)[:most]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
                killed.append(process)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield killed
    finally:
        over.set()
        killer.join()


def wait_for(condition: Callable[[], object], seconds: float = 180) -> None:
    """Waits until something comes about; fails where it does not."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


def printed_by_jobs(stderr: str) -> list[str]:
    """The lines of a standard error, without those of Ray's own server.

    Ray Data kills its actors when a job fails. One that has ended by itself in that moment makes
    the server log "Failed to kill actor", which Ray prints wherever `ray.init` was called.
    """
    return [line for line in stderr.splitlines() if "(pid=gcs_server)" not in line]
