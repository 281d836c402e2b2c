"""Gaussian noise."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from fer_ray.config.registries import AUGMENTATIONS
from fer_ray.transforms import keyed_random
from fer_ray.transforms.operation import BatchContext, Draws, Option, PixelChange
from fer_ray.transforms.tensors import column, indices, move

PROBABILITY = 0.5
"""How often an image gets noise, where noise is on."""


class Noise(PixelChange):
    """Adds noise to half of the images, each with a standard deviation of its own."""

    position, in_albumentations = 70, True
    options = (
        Option(
            name="noise",
            doc="Largest standard deviation of Gaussian noise as a fraction of the range; half "
            "of the images.",
            high=0.5,
            usual=0.05,
            search_high=0.08,
        ),
    )

    def sample(
        self, magnitudes: Mapping[str, float], draws: Draws, height: int, width: int
    ) -> np.ndarray:
        """Standard deviations in grey levels; 0 where there is no noise."""
        sigmas = draws.between("noise_sigma", 0.0, 255.0 * magnitudes["noise"])
        return np.where(draws["noise"] < PROBABILITY, sigmas, 0.0)

    def apply(
        self, pixels: torch.Tensor, parameters: np.ndarray, context: BatchContext
    ) -> torch.Tensor:
        pixels = pixels.float()
        noisy = parameters > 0
        if not noisy.any():
            return pixels
        height, width = pixels.shape[1:]
        rows = indices(noisy, pixels.device)
        starts = keyed_random.streams(context.seed, context.epoch, context.samples, purpose=1)
        keys = move(torch.from_numpy(starts[noisy].view(np.int64)), pixels.device)
        even = height * width + height * width % 2
        noise = keyed_random.normals(keys, even)[:, : height * width].view(-1, height, width)
        changed = pixels[rows] + noise * column(parameters[noisy], pixels.device)
        return pixels.index_copy(0, rows, changed.clamp_(0.0, 255.0))


AUGMENTATIONS.register("noise")(Noise())
