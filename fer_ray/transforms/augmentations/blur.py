"""Gaussian blur."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch.nn import functional as F

from fer_ray.config.registries import AUGMENTATIONS
from fer_ray.transforms.operation import BatchContext, Draws, Option, PixelChange
from fer_ray.transforms.tensors import indices, to_tensor

LEAST_SIGMA = 0.1
"""Smallest standard deviation of a blur that is applied, in pixels; its kernel is one pixel."""
PROBABILITY = 0.5
"""How often an image is blurred, where blur is on."""
_REACH = 3.5
"""Half the width of the kernel in standard deviations, as albumentations has it."""


class Blur(PixelChange):
    """Blurs half of the images, each with a standard deviation of its own."""

    position, in_albumentations = 60, True
    options = (
        Option(
            name="blur",
            doc="Largest standard deviation of a Gaussian blur in pixels; half of the images.",
            high=4,
            usual=1,
            search_high=1.5,
        ),
    )

    def sample(
        self, magnitudes: Mapping[str, float], draws: Draws, height: int, width: int
    ) -> np.ndarray:
        """Standard deviations in pixels; 0 where there is no blur."""
        high = magnitudes["blur"]
        sigmas = draws.between("blur_sigma", min(LEAST_SIGMA, high), high)
        return np.where(draws["blur"] < PROBABILITY, sigmas, 0.0)

    def apply(
        self, pixels: torch.Tensor, parameters: np.ndarray, context: BatchContext
    ) -> torch.Tensor:
        pixels = pixels.float()
        reach = (_REACH * parameters).astype(int)  # 0: the kernel is the pixel alone
        blurred = reach > 0
        if not blurred.any():
            return pixels
        sigmas, reach = parameters[blurred], reach[blurred]
        # reflection needs pixels to reflect: tiny images get a narrower kernel
        limit = min(int(reach.max()), min(pixels.shape[1:]) - 1)
        if limit < 1:
            return pixels
        offsets = np.arange(-limit, limit + 1)
        kernels = np.exp(-0.5 * (offsets / sigmas[:, None]) ** 2)
        kernels = kernels * (abs(offsets) <= reach[:, None])
        kernels = kernels / kernels.sum(1, keepdims=True)
        weights = to_tensor(kernels, pixels.device)[:, :, None, None]
        rows = indices(blurred, pixels.device)
        return pixels.index_copy(0, rows, _convolve(pixels[rows], weights, limit))


def _convolve(pixels: torch.Tensor, weights: torch.Tensor, limit: int) -> torch.Tensor:
    """Applies a kernel of its own to each image, along rows, then along columns.

    A sum of shifted images: a convolution with kernels of its own for each image is slower.
    """
    height, width = pixels.shape[1:]
    padded = F.pad(pixels.unsqueeze(1), [limit] * 4, mode="reflect").squeeze(1)
    across = sum(weights[:, k] * padded[:, :, k : k + width] for k in range(2 * limit + 1))
    assert isinstance(across, torch.Tensor)
    along = sum(weights[:, k] * across[:, k : k + height] for k in range(2 * limit + 1))
    assert isinstance(along, torch.Tensor)
    return along.clamp_(0.0, 255.0)


AUGMENTATIONS.register("blur")(Blur())
