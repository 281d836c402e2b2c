"""This process: its threads and its memory."""

from __future__ import annotations

import contextlib
import ctypes

import torch

from fer_ray.config.schema import ScalingConfig


def out_of_memory(error: BaseException) -> str | None:
    """The reason why a training ended, where memory was short; None for other errors."""
    line = (str(error) or repr(error)).splitlines()[0]
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return f"out of memory: {line}"
    # what PyTorch raises on CPUs
    told = isinstance(error, RuntimeError) and "alloc" in line and "memory" in line
    return f"out of memory: {line}" if told else None


def num_threads(scaling: ScalingConfig) -> int:
    """Threads of each process on the CPU."""
    return scaling.threads_per_worker or max(int(scaling.cpus_per_worker), 1)


def keep_freed_memory() -> None:
    """Lets the C library reuse large blocks instead of giving each back to the kernel.

    Every step frees and asks for the same megabytes; fetching them anew, page by page, costs
    more than filling them. mallopt(3): M_TRIM_THRESHOLD is -1, M_MMAP_THRESHOLD is -3.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        library = ctypes.CDLL("libc.so.6")
        for parameter in (-1, -3):
            library.mallopt(parameter, 2**30)
