"""The errors of GPUs: which mean too little memory, and which a GPU that does not work."""

from __future__ import annotations

import pytest
import torch
from torch.distributed import DistBackendError

from fer_ray.errors import JobFailed
from fer_ray.runtime import process

NCCL = """NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:94, unhandled \
cuda error (run with NCCL_DEBUG=INFO for details), NCCL version 2.28.9
ncclUnhandledCudaError: Call to CUDA function failed.
Last error:
Cuda failure {}"""

OUT_OF_MEMORY = [
    MemoryError("no more"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: not enough memory"),
    torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    DistBackendError(NCCL.format("2 'out of memory'")),
    DistBackendError(NCCL.format("'out of memory'")),
]

UNUSABLE = [
    RuntimeError(
        "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and "
        "installed a driver from http://www.nvidia.com/Download/index.aspx"
    ),
    RuntimeError("The NVIDIA driver on your system is too old (found version 12080)."),
    RuntimeError("CUDA driver initialization failed, you might not have a CUDA gpu."),
    RuntimeError("CUDA unknown error - this may be due to an incorrectly set up environment"),
    RuntimeError("Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions"),
    RuntimeError("No CUDA GPUs are available"),
    AssertionError("Torch not compiled with CUDA enabled"),
    torch.AcceleratorError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"),
    torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"),
    DistBackendError(NCCL.format("999 'unknown error'")),
]

KERNEL_FAULTS = [
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCompile with"),
    torch.AcceleratorError("CUDA error: device-side assert triggered"),
]

OTHERS = [RuntimeError("shape mismatch"), ValueError("cannot allocate memory"), OSError()]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_every_wording_of_too_little_memory_is_known(error):
    assert process.out_of_memory(error) == f"out of memory: {str(error).splitlines()[0]}"
    assert process.gpu_failure(error) is None


@pytest.mark.parametrize("error", [*UNUSABLE, *KERNEL_FAULTS], ids=str)
def test_errors_of_gpus_and_drivers_are_told_from_those_of_a_computation(error):
    assert process.gpu_failure(error) == str(error).splitlines()[0]
    assert process.out_of_memory(error) is None
    assert process.is_kernel_fault(str(error)) == (error in KERNEL_FAULTS)


@pytest.mark.parametrize("error", OTHERS, ids=repr)
def test_other_errors_are_taken_for_neither(error):
    assert process.out_of_memory(error) is None and process.gpu_failure(error) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_fails_with_the_nodes_address_and_id(ray_cluster):
    reason, node = process.try_gpu(torch.device("cuda", 0))
    assert reason.startswith("the GPU of node ") and "NVIDIA driver" in reason
    assert node == ray_cluster.nodes()[0]["NodeID"]


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of 16 GiB; the list receives the fractions that a process is limited to."""
    limits: list[float] = []
    properties = type("Properties", (), {"total_memory": 16 * 2**30})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    return limits


@pytest.mark.parametrize("num_processes", [2, 4])
def test_processes_that_share_a_gpu_fit_it_with_their_contexts(gpu, num_processes):
    process.limit_gpu_memory(1 / num_processes)
    context = process._CUDA_CONTEXT_BYTES / (16 * 2**30)
    assert 0.2 < num_processes * (gpu[0] + context) <= 1.0


def test_a_fraction_without_room_for_a_context_is_refused(gpu):
    with pytest.raises(JobFailed, match=r"--gpus-per-trial: 0.03 of this GPU's memory is 492 MiB"):
        process.limit_gpu_memory(0.03)
    assert not gpu
