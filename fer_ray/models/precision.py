"""In which arithmetic a network computes: float32, TensorFloat-32 or bfloat16."""

from __future__ import annotations

import contextlib

import torch

from fer_ray.config.model import ModelConfig

ORDER = ("float32", "tf32", "bfloat16")
"""The arithmetics, the most exact first.

`float32`: every product in float32. `tf32`: on GPUs, products of numbers with 10 bits of mantissa,
added up in float32. `bfloat16`: convolutions and matrix products of numbers with 7 bits (autocast).
"""


def for_training(precision: str, model: ModelConfig, device: torch.device) -> str:
    """The arithmetic that a setting stands for on a device, one of `ORDER`.

    Args:
        precision: the setting: ``auto``, or one of `ORDER`.
        model: the network.
        device: where it computes. CPUs have no ``tf32`` and compute in float32 instead.
    """
    if precision == "auto":
        return "bfloat16" if prefers_bfloat16(model, device) else "float32"
    return "float32" if precision == "tf32" and device.type == "cpu" else precision


def for_inference(trained: str, model: ModelConfig, device: torch.device) -> str:
    """The arithmetic in which a device predicts with a network.

    That of training, unless the device is slow in it: a network trained in bfloat16 predicts in
    float32 on CPUs without instructions for bfloat16, 5 to 10 times faster than in bfloat16.

    Args:
        trained: in which it was trained, one of `ORDER`.
        model: the network.
        device: where it computes.
    """
    if trained == "bfloat16" and not prefers_bfloat16(model, device):
        return "float32"
    return for_training(trained, model, device)


def prefers_bfloat16(model: ModelConfig, device: torch.device) -> bool:
    """Whether a device runs a network faster in bfloat16: what ``--precision auto`` goes by.

    GPUs do. CPUs do where they have instructions for it (AMX, AVX512_BF16) and the network has
    no operations that are slow in it.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return model.faster_in_bfloat16 and cpu_has_bfloat16()


def cpu_has_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16; False where torch does not tell."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_tile") or capabilities.get("avx512_bf16"))


def set_tf32(precision: str) -> None:
    """Allows TensorFloat-32 in this process for ``tf32`` alone, in cuDNN and in cuBLAS.

    PyTorch allows it in convolutions by default, which would make a run that says ``float32``
    one in TensorFloat-32.
    """
    name = "tf32" if precision == "tf32" else "ieee"
    torch.backends.cudnn.conv.fp32_precision = name  # type: ignore[attr-defined]  # no stub
    torch.backends.cuda.matmul.fp32_precision = name


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """The context in which a forward pass computes."""
    if precision == "bfloat16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()
