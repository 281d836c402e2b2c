"""What GPUs can do at most, from NVIDIA's data sheets."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """The limits of a device."""

    flops: dict[str, float]
    """FLOP/s by arithmetic, of `precision.ORDER`: those of tensor cores for ``bfloat16`` and
    ``tf32``, without sparsity, and those of the other cores for ``float32``. An arithmetic that the
    device does not have is missing."""
    bytes_per_s: float
    """Bandwidth of the device's memory."""
    source: str
    """Where the numbers are from."""


def _data_sheet(
    title: str, *, float32: float, tf32: float = 0.0, bfloat16: float = 0.0, gb_per_s: float
) -> Peaks:
    """Limits in TFLOP/s and GB/s; 0: the device lacks the arithmetic."""
    tflops = {"float32": float32, "tf32": tf32, "bfloat16": bfloat16}
    return Peaks(
        flops={name: value * 1e12 for name, value in tflops.items() if value},
        bytes_per_s=gb_per_s * 1e9,
        source=f"NVIDIA {title} data sheet",
    )


def _a100(title: str, gb_per_s: float) -> Peaks:
    return _data_sheet(title, float32=19.5, tf32=156, bfloat16=312, gb_per_s=gb_per_s)


def _hopper(title: str, gb_per_s: float) -> Peaks:
    """The SXM modules. The data sheets have the numbers with sparsity, which are twice these."""
    return _data_sheet(title, float32=67, tf32=494.5, bfloat16=989.5, gb_per_s=gb_per_s)


def _hopper_nvl(title: str, gb_per_s: float) -> Peaks:
    """The NVL cards; as of `_hopper`, half of what the data sheets have with sparsity."""
    return _data_sheet(title, float32=60, tf32=417.5, bfloat16=835.5, gb_per_s=gb_per_s)


PEAKS = {
    "Tesla T4": _data_sheet("T4", float32=8.1, gb_per_s=300),
    "NVIDIA A10": _data_sheet("A10", float32=31.2, tf32=62.5, bfloat16=125, gb_per_s=600),
    "NVIDIA L4": _data_sheet("L4", float32=30.3, tf32=60, bfloat16=121, gb_per_s=300),
    "NVIDIA L40S": _data_sheet("L40S", float32=91.6, tf32=183, bfloat16=362, gb_per_s=864),
    "NVIDIA A100-PCIE-40GB": _a100("A100 40GB PCIe", 1555),
    "NVIDIA A100-SXM4-40GB": _a100("A100 40GB SXM", 1555),
    "NVIDIA A100 80GB PCIe": _a100("A100 80GB PCIe", 1935),
    "NVIDIA A100-SXM4-80GB": _a100("A100 80GB SXM", 2039),
    "NVIDIA H100 PCIe": _data_sheet(
        "H100 PCIe", float32=51, tf32=378, bfloat16=756.5, gb_per_s=2000
    ),
    "NVIDIA H100 NVL": _hopper_nvl("H100 NVL", 3900),
    "NVIDIA H100 80GB HBM3": _hopper("H100 SXM", 3350),
    "NVIDIA H200 NVL": _hopper_nvl("H200 NVL", 4800),
    "NVIDIA H200": _hopper("H200 SXM", 4800),
}
"""By the name that the driver gives a whole device; a slice of one (MIG) has another name."""


def of(device: torch.device) -> Peaks | None:
    """The limits of a device; None for CPUs and for GPUs that `PEAKS` does not have."""
    if device.type == "cpu":
        return None
    return PEAKS.get(torch.cuda.get_device_properties(device).name)
