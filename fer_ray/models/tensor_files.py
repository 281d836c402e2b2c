"""Tensors as safetensors, which hold no code; what is read has only finite numbers."""

from __future__ import annotations

from collections.abc import Mapping

import safetensors.torch
import torch

from fer_ray.errors import UserError, first_line


def to_bytes(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """The content of a file with these tensors, from any device."""
    return safetensors.torch.save(_on_cpu(tensors))


def parse(content: bytes, path: str) -> dict[str, torch.Tensor]:
    """The tensors of a file.

    Args:
        content: the file, whole.
        path: its path, for messages.

    Raises:
        UserError: where it is not in the format, or a value is infinite or not a number.
    """
    try:
        tensors = safetensors.torch.load(content)
        infinite = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    except Exception as error:  # readers of damaged files raise nearly anything
        raise UserError(f"{path} does not hold tensors: {first_line(error)}") from error
    if infinite:
        raise UserError(f"{path}: {infinite[0]!r} has values that are infinite or no numbers")
    return tensors


def _on_cpu(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous copies in the CPU's memory, in one transfer for each dtype.

    EfficientNet-B2 has about two thousand tensors with its average and its optimizer's state: one
    by one, each copy would wait for the GPU.
    """
    copies: dict[str, torch.Tensor] = {}
    for dtype in {value.dtype for value in tensors.values()}:
        same = {key: value.detach() for key, value in tensors.items() if value.dtype == dtype}
        flat = torch.cat([value.contiguous().flatten() for value in same.values()]).cpu()
        parts = flat.split([value.numel() for value in same.values()])
        copies |= {key: part.view(same[key].shape) for key, part in zip(same, parts)}
    return {key: copies[key] for key in tensors}
