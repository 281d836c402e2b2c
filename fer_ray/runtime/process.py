"""This process: its threads, its memory and its GPU."""

from __future__ import annotations

import contextlib
import ctypes

import torch

from fer_ray.config.schema import ScalingConfig
from fer_ray.errors import JobFailed, UserError, first_line

_CUDA_OUT_OF_MEMORY = (
    "CUDA error: out of memory",  # outside PyTorch's allocator, when a context is created
    "CUDA ran out of memory",  # cuDNN compiling a kernel
    "CUDA driver error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",  # its name since cuDNN 9
    "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    "Cuda failure 2",  # NCCL: 2 is cudaErrorMemoryAllocation
    "Cuda failure 'out of memory'",  # NCCL before 2.19
)
"""How CUDA and its libraries report that memory ran out; PyTorch's allocator has its own type."""

_GPU_UNUSABLE = (
    "NVIDIA driver",  # "Found no …", "The … on your system is too old"
    "CUDA initialization",
    "CUDA driver",  # "CUDA driver initialization failed", "CUDA driver error: …"
    "CUDA unknown error",
    "No CUDA GPUs are available",
    "cudaGetDeviceCount",  # "Unexpected error from …"
    "Torch not compiled with CUDA enabled",
    "Cuda failure",  # NCCL, except where memory ran out
)
"""Parts of messages about a GPU or a driver that does not work; in PyTorch these are plain
exceptions, and `torch.AcceleratorError` only covers errors of the device itself."""

_KERNEL_FAULTS = (
    "illegal memory access",
    "device-side assert",
    "misaligned address",
    "illegal instruction",
    "unspecified launch failure",
    "launch timed out",
)
"""Errors of a kernel that ran: the GPU may be broken, but the computation may be as well."""

_CUDA_CONTEXT_BYTES = 640 * 2**20
"""GPU memory, assumed rather than measured, that a process takes beside PyTorch's allocator: the
CUDA context with its loaded kernels, and the handles of cuBLAS and cuDNN."""


def out_of_memory(error: BaseException) -> str | None:
    """Returns a reason where an error means that memory ran out, else None."""
    is_typed = isinstance(error, MemoryError | torch.OutOfMemoryError)
    line, text = first_line(error), str(error)
    is_untyped = isinstance(error, RuntimeError) and (
        # on CPUs PyTorch raises "…DefaultCPUAllocator: can't allocate memory…"
        ("alloc" in line and "memory" in line)
        # not the first line only: NCCL's own message is the last of PyTorch's
        or any(wording in text for wording in _CUDA_OUT_OF_MEMORY)
    )
    return f"out of memory: {line}" if is_typed or is_untyped else None


def gpu_failure(error: BaseException) -> str | None:
    """Returns a reason where a GPU or its driver failed and memory did not run out, else None."""
    is_typed = isinstance(error, torch.AcceleratorError)
    is_untyped = isinstance(error, RuntimeError | AssertionError) and any(
        wording in str(error) for wording in _GPU_UNUSABLE
    )
    if not (is_typed or is_untyped) or out_of_memory(error):
        return None
    return first_line(error)


def gpu_failure_here(error: BaseException) -> tuple[str, str] | None:
    """As `gpu_failure`, in a process of Ray: the reason with the node's address, and its id."""
    import ray.util

    reason = gpu_failure(error)
    if not reason:
        return None
    address = ray.util.get_node_ip_address()
    return (
        f"the GPU of node {address} failed: {reason}",
        ray.get_runtime_context().get_node_id(),
    )


def is_kernel_fault(reason: str) -> bool:
    """Whether a reason from `gpu_failure` may as well be a fault of the computation."""
    return any(wording in reason for wording in _KERNEL_FAULTS)


def try_gpu(device: torch.device) -> tuple[str, str] | None:
    """Makes a GPU the current one and computes on it.

    Returns:
        As `gpu_failure_here`; None where nothing failed.
    """
    try:
        torch.cuda.set_device(device)
        torch.zeros(1, device=device).add_(1).cpu()
    except Exception as error:
        return gpu_failure_here(error)
    return None


def limit_gpu_memory(fraction: float) -> None:
    """Keeps this process within its fraction of a GPU that several processes share.

    Without a limit, a process that needs too much makes the others run out of memory.

    Args:
        fraction: of the GPU's memory, above 0 and at most 1; the CUDA context is part of it.

    Raises:
        JobFailed: where the fraction leaves nothing beside the CUDA context.
    """
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    left = fraction * total - _CUDA_CONTEXT_BYTES
    if left <= 0:
        raise JobFailed(
            f"--gpus-per-trial: {fraction:g} of this GPU's memory is "
            f"{fraction * total / 2**20:,.0f} MiB, but a CUDA context alone takes about "
            f"{_CUDA_CONTEXT_BYTES / 2**20:,.0f} MiB; use a larger fraction"
        )
    torch.cuda.set_per_process_memory_fraction(left / total)


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
