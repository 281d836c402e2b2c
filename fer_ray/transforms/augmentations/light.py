"""Augmentations of light: brightness and contrast."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from fer_ray.config.registries import AUGMENTATIONS
from fer_ray.transforms.operation import BatchContext, Draws, Option, PixelChange
from fer_ray.transforms.tensors import column


class Brightness(PixelChange):
    """Adds the same to all pixels of an image."""

    position, in_albumentations = 40, True
    options = (
        Option(
            name="brightness",
            doc="Largest change of brightness, as a fraction of the range, either way.",
            high=1,
            usual=0.2,
            search_high=0.3,
        ),
    )

    def sample(
        self, magnitudes: Mapping[str, float], draws: Draws, height: int, width: int
    ) -> np.ndarray:
        """Grey levels to add."""
        limit = magnitudes["brightness"]
        return 255.0 * draws.between("brightness", -limit, limit)

    def apply(
        self, pixels: torch.Tensor, parameters: np.ndarray, context: BatchContext
    ) -> torch.Tensor:
        return (pixels + column(parameters, pixels.device)).clamp_(0.0, 255.0)


class Contrast(PixelChange):
    """Scales the distance of each pixel to the image's mean."""

    position, in_albumentations = 50, True
    options = (
        Option(
            name="contrast",
            doc="Largest change of contrast about the image's mean, as a fraction, either way.",
            high=1,
            usual=0.3,
            search_high=0.4,
        ),
    )

    def sample(
        self, magnitudes: Mapping[str, float], draws: Draws, height: int, width: int
    ) -> np.ndarray:
        """Factors of the distance."""
        limit = magnitudes["contrast"]
        return 1.0 + draws.between("contrast", -limit, limit)

    def apply(
        self, pixels: torch.Tensor, parameters: np.ndarray, context: BatchContext
    ) -> torch.Tensor:
        pixels = pixels.float()
        mean = pixels.mean(dim=(1, 2), keepdim=True)
        return ((pixels - mean) * column(parameters, pixels.device) + mean).clamp_(0.0, 255.0)


AUGMENTATIONS.register("brightness")(Brightness())
AUGMENTATIONS.register("contrast")(Contrast())
