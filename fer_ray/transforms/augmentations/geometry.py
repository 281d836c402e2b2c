"""Augmentations that move pixels: flip, rotation with shift and zoom, random resized crop.

The distributions are those of the albumentations transforms in `albumentations_engine`, rounding
to whole pixels included, so that both engines mean the same by one configuration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from fer_ray.config.registries import AUGMENTATIONS
from fer_ray.transforms.operation import Draws, Option, Warp

CROP_RATIOS = (3 / 4, 4 / 3)
"""Lowest and highest width over height of a crop (Szegedy et al. 2014, arXiv:1409.4842)."""
_CROP_ATTEMPTS = 10


class Flip(Warp):
    """Mirrors left and right."""

    position, is_exact, in_albumentations = 10, True, True
    options = (
        Option(
            name="flip",
            doc="Probability of mirroring an image.",
            high=1,
            usual=0.5,
            search_high=0.5,  # more is the same as less
        ),
    )

    def sample(
        self, magnitudes: Mapping[str, float], draws: Draws, height: int, width: int
    ) -> np.ndarray:
        warps = np.tile(np.eye(2, 3), (len(draws), 1, 1))
        flipped = draws["flip"] < magnitudes["flip"]
        warps[flipped, 0, 0], warps[flipped, 0, 2] = -1.0, width - 1
        return warps


class Affine(Warp):
    """Scales, then rotates about the centre, then shifts by whole pixels."""

    position, in_albumentations = 20, True
    options = (
        Option(
            name="rotation",
            doc="Largest rotation in degrees, either way.",
            high=180,
            usual=15,
            search_high=30,
        ),
        Option(
            name="translation",
            doc="Largest shift as a fraction of the side, either way, along and across.",
            high=0.5,
            usual=0.12,
            search_high=0.2,
        ),
        Option(
            name="zoom",
            doc="Largest change of scale about the centre, as a fraction, either way.",
            high=0.5,
            usual=0.12,
            search_high=0.25,
        ),
    )

    def sample(
        self, magnitudes: Mapping[str, float], draws: Draws, height: int, width: int
    ) -> np.ndarray:
        """The inverse of what happens to the image: from its result to its pixels."""
        degrees, zoom = magnitudes["rotation"], magnitudes["zoom"]
        angle = np.deg2rad(draws.between("rotation", -degrees, degrees))
        scale = draws.between("zoom", 1 - zoom, 1 + zoom)
        limit = magnitudes["translation"]
        shift_x = np.trunc(draws.between("shift_x", -limit, limit) * width)
        shift_y = np.trunc(draws.between("shift_y", -limit, limit) * height)
        cosine, sine = np.cos(angle) / scale, np.sin(angle) / scale
        centre_x, centre_y = (width - 1) / 2, (height - 1) / 2
        warps = np.empty((len(angle), 2, 3))
        warps[:, 0, 0], warps[:, 0, 1] = cosine, -sine
        warps[:, 1, 0], warps[:, 1, 1] = sine, cosine
        x, y = centre_x + shift_x, centre_y + shift_y
        warps[:, 0, 2] = centre_x - cosine * x + sine * y
        warps[:, 1, 2] = centre_y - sine * x - cosine * y
        return warps


class Crop(Warp):
    """Stretches a random rectangle of whole pixels to the whole image.

    It is a warp of its own after the affine one, as in albumentations: what is interpolated
    twice is smoother.
    """

    position, in_albumentations = 30, True
    options = (
        Option(
            name="crop",
            doc="Random resized crop: largest fraction of the area that is cut away.",
            high=0.9,
            usual=0.35,
            search_high=0.5,
        ),
    )

    def sample(
        self, magnitudes: Mapping[str, float], draws: Draws, height: int, width: int
    ) -> np.ndarray:
        attempts = range(_CROP_ATTEMPTS)
        areas = np.stack([draws[f"crop_area_{attempt}"] for attempt in attempts], axis=1)
        ratios = np.stack([draws[f"crop_ratio_{attempt}"] for attempt in attempts], axis=1)
        area = height * width * (1.0 - magnitudes["crop"] * areas)
        low, high = (math.log(ratio) for ratio in CROP_RATIOS)
        ratio = np.exp(low + (high - low) * ratios)
        widths, heights = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
        fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
        # the first attempt that fits; where none does, the whole image
        first, rows = fits.argmax(1), np.arange(len(fits))
        none = ~fits.any(1)
        crop_width = np.where(none, width, widths[rows, first])
        crop_height = np.where(none, height, heights[rows, first])
        left = np.floor((width - crop_width + 1) * draws["crop_x"])
        top = np.floor((height - crop_height + 1) * draws["crop_y"])
        warps = np.zeros((len(fits), 2, 3))
        warps[:, 0, 0], warps[:, 1, 1] = crop_width / width, crop_height / height
        # the centres of pixels are half a pixel from their edges
        warps[:, 0, 2] = left + warps[:, 0, 0] / 2 - 0.5
        warps[:, 1, 2] = top + warps[:, 1, 1] / 2 - 0.5
        return warps


AUGMENTATIONS.register("flip")(Flip())
AUGMENTATIONS.register("affine")(Affine())
AUGMENTATIONS.register("crop")(Crop())
