"""This process: its threads and its memory."""

from __future__ import annotations

import contextlib
import ctypes

import torch

from fer_ray.config.schema import ScalingConfig
from fer_ray.errors import UserError, first_line


def out_of_memory(error: BaseException) -> str | None:
    """Returns a reason where an error means that memory ran out, else None."""
    is_typed = isinstance(error, MemoryError | torch.OutOfMemoryError)
    line = first_line(error)
    # on CPUs PyTorch raises a plain RuntimeError: "…DefaultCPUAllocator: can't allocate memory…"
    is_untyped = isinstance(error, RuntimeError) and "alloc" in line and "memory" in line
    return f"out of memory: {line}" if is_typed or is_untyped else None


def num_threads(scaling: ScalingConfig) -> int:
    """Number of CPU threads of each worker process."""
    return scaling.threads_per_worker or max(int(scaling.cpus_per_worker), 1)


def check_gpu() -> None:
    """Checks that this process has a GPU, for a job that runs without Ray.

    Raises:
        UserError: where torch finds none.
    """
    if not torch.cuda.is_available():
        raise UserError("--use-gpu: --local runs in this process, which has no GPU: leave it out")


def keep_freed_memory() -> None:
    """Makes the C library reuse large blocks instead of returning each to the kernel.

    Every training step allocates and frees the same megabytes; mapping them again, page by page,
    costs more than filling them. The first argument of mallopt(3) is M_TRIM_THRESHOLD (-1) or
    M_MMAP_THRESHOLD (-3); the second is in bytes.
    """
    with contextlib.suppress(OSError, AttributeError):  # a C library other than glibc
        library = ctypes.CDLL("libc.so.6")
        for parameter in (-1, -3):
            library.mallopt(parameter, 2**30)
