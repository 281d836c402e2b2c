"""SIGINT and SIGTERM end a job soon, with one line, a status of its own and nothing left behind.

SIGTERM is what Kubernetes, Slurm and systemd send; ``ray job stop`` kills a job three seconds
later. Ray has handlers of its own, which print a stack trace or leave processes: `install` has to
be called after `ray.init`.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

GRACE_S = 2.0
"""Seconds after SIGTERM in which a job may end by itself."""
LINE = "interrupted; run the same command to resume"
"""What an interrupted job says."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_received: list[int] = []
"""The signals so far; the first decides the status."""
_program: list[str] = []
"""The program's name in `LINE`, until the line has been printed."""
_owns_ray: list[bool] = []
"""Not empty where this process starts a Ray cluster, whose processes end with it."""


@contextlib.contextmanager
def handling(program: str) -> Iterator[None]:
    """Handles both signals in the block: the first raises `KeyboardInterrupt`, a second ends.

    Args:
        program: its name in `LINE`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in _SIGNALS}
    _program[:] = [program]
    install()
    try:
        yield
    finally:
        _program.clear()
        _owns_ray.clear()
        for number, handler in previous.items():
            signal.signal(number, handler)


def install() -> None:
    """Replaces the handlers that Ray has installed meanwhile, within `handling`."""
    if _program and threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            signal.signal(number, _handle)


def own_ray() -> None:
    """Notes, within `handling`, that this process starts a Ray cluster."""
    if _program:
        _owns_ray.append(True)


def defer(notify: Callable[[], None]) -> Callable[[], None]:
    """Has the first signal call a function instead of raising `KeyboardInterrupt`.

    Raised while Python runs a finalizer, the exception would be printed and lost.

    Returns:
        A function that ends this.
    """
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    previous = {number: signal.getsignal(number) for number in _SIGNALS}

    def handle(number: int, frame: FrameType | None) -> None:
        restore()
        _note(number)
        notify()

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    for number in _SIGNALS:
        signal.signal(number, handle)
    return restore


def terminated() -> None:
    """Notes a SIGTERM that a handler of Ray's has received."""
    _note(signal.SIGTERM)


def end() -> NoReturn:
    """Prints `LINE`, ends the processes of the own cluster and this one: 128 and the signal."""
    with contextlib.suppress(OSError, ValueError):  # a closed pipe
        sys.stdout.flush()
        while _program:
            print(f"{_program.pop()}: {LINE}", file=sys.stderr, flush=True)
    if _owns_ray:
        _kill_descendants()
        os._exit(status())
    sys.exit(status())


def status() -> int:
    """The exit status of an interrupted job: 130 after SIGINT, 143 after SIGTERM."""
    return 128 + (_received[0] if _received else signal.SIGINT)


def _handle(number: int, frame: FrameType | None) -> None:
    _note(number)
    raise KeyboardInterrupt


def _note(number: int) -> None:
    if _received:
        _end_at_once()
    _received.append(number)
    if number == signal.SIGTERM:
        # an exception may be lost in a finalizer, or wait for a call that does not return
        watchdog = threading.Timer(GRACE_S, _end_at_once)
        watchdog.daemon = True
        watchdog.start()


def _end_at_once() -> NoReturn:
    try:
        end()
    finally:
        os._exit(status())


def _kill_descendants() -> None:
    """Kills all processes that this one started, again until no new one is found."""
    psutil = importlib.import_module("psutil")  # a dependency of Ray
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        descendants = psutil.Process().children(recursive=True)
        if not any(_is_running(process) for process in descendants):
            return
        for process in descendants:
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(0.02)


def _is_running(process) -> bool:
    psutil = importlib.import_module("psutil")
    with contextlib.suppress(psutil.Error):
        return process.status() != psutil.STATUS_ZOMBIE
    return False
