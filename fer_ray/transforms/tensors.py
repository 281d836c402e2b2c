"""Small arrays of random parameters as tensors, without a GPU being waited for."""

from __future__ import annotations

import numpy as np
import torch


def move(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a device; from pinned memory, so that a GPU is not waited for."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def to_tensor(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """An array as float32 on a device."""
    return move(torch.from_numpy(values.astype(np.float32)), device)


def indices(chosen: np.ndarray, device: torch.device) -> torch.Tensor:
    """Positions where a mask is True: int64 on a device."""
    return move(torch.from_numpy(np.flatnonzero(chosen)), device)


def column(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """One number an image, to be combined with (N, H, W): (N, 1, 1) float32 on a device."""
    return to_tensor(values, device).view(-1, 1, 1)
