"""What the `device` engine does to each image, drawn for a whole batch at once.

The distributions are those of the albumentations transforms in `library`: rounding to whole
pixels included, so that both engines mean the same by one configuration.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fer_ray.config.schema import TransformConfig
from fer_ray.transforms import keyed_random

LEAST_SIGMA = 0.1
"""The smallest deviation of a blur that is applied, in pixels; its kernel is a single pixel."""
BLUR_SHARE = NOISE_SHARE = 0.5
"""How often blur and noise are applied, where they are on."""
ERASED_SIDES = (0.1, 0.4)
"""Shortest and longest side of an erased rectangle, as a share of the image's."""
CROP_RATIOS = (3 / 4, 4 / 3)
"""Lowest and highest width over height of a crop (Szegedy et al. 2014, arXiv:1409.4842)."""
_CROP_ATTEMPTS = 10


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """One row an image; None where an option is off."""

    warps: list[np.ndarray]
    """(N, 2, 3) float64, at most two, one after the other: from an output pixel (x, y, 1) to the
    pixel (x, y) that it shows."""
    brightness: np.ndarray | None
    """(N,) float64 grey levels to add."""
    contrast: np.ndarray | None
    """(N,) float64 factors of the distance to the image's mean."""
    blur: np.ndarray | None
    """(N,) float64 deviations in pixels; 0 where there is no blur."""
    noise: np.ndarray | None
    """(N,) float64 deviations in grey levels; 0 where there is no noise."""
    erased: np.ndarray | None
    """(N, 4) int64: left, top, right, bottom of the erased rectangle; empty where none is."""


class _Draws:
    """The columns of a batch's uniform numbers, handed out by name of use.

    Every use has its place whether it is on or off: switching one option does not change what
    the others draw.
    """

    _PLACES = (
        *("flip", "rotation", "shift_x", "shift_y", "zoom", "crop_x", "crop_y"),
        *("brightness", "contrast", "blur", "blur_sigma", "noise", "noise_sigma"),
        *("erase", "erase_width", "erase_height", "erase_x", "erase_y"),
    )

    def __init__(self, starts: np.ndarray) -> None:
        self._all = keyed_random.uniforms(starts, len(self._PLACES) + 2 * _CROP_ATTEMPTS)

    def __getitem__(self, use: str) -> np.ndarray:
        return self._all[:, self._PLACES.index(use)]

    def between(self, use: str, low: float, high: float) -> np.ndarray:
        return low + (high - low) * self[use]

    def crop_attempts(self) -> tuple[np.ndarray, np.ndarray]:
        attempts = self._all[:, len(self._PLACES) :]
        return attempts[:, ::2], attempts[:, 1::2]


def draw(config: TransformConfig, starts: np.ndarray, height: int, width: int) -> Parameters:
    """Draws what happens to each image.

    Args:
        config: the strengths.
        starts: (N,) uint64 from `randomness.streams`.
        height: of the images, in pixels.
        width: of the images, in pixels.
    """
    draws = _Draws(starts)

    def magnitude(name: str) -> float:
        return getattr(config, name)

    def symmetric(name: str) -> np.ndarray | None:
        limit = magnitude(name)
        return draws.between(name, -limit, limit) if limit else None

    brightness, contrast = symmetric("brightness"), symmetric("contrast")
    return Parameters(
        warps=_warps(config, draws, height, width),
        brightness=None if brightness is None else 255.0 * brightness,
        contrast=None if contrast is None else 1.0 + contrast,
        blur=_sometimes(draws, "blur", BLUR_SHARE, LEAST_SIGMA, magnitude("blur")),
        noise=_sometimes(draws, "noise", NOISE_SHARE, 0.0, 255.0 * magnitude("noise")),
        erased=_erased(magnitude("erasing"), draws, height, width),
    )


def _sometimes(draws: _Draws, use: str, share: float, low: float, high: float) -> np.ndarray | None:
    if high == 0:
        return None
    sigma = draws.between(f"{use}_sigma", min(low, high), high)
    return np.where(draws[use] < share, sigma, 0.0)


def _warps(config: TransformConfig, draws: _Draws, height: int, width: int) -> list[np.ndarray]:
    """Flip, then rotation, zoom and shift about the centre, then crop.

    The crop is a pass of its own after the others, as in albumentations: what is interpolated
    twice is smoother. A flip moves whole pixels and joins the first pass.
    """
    warps = []
    if config.rotation or config.translation or config.zoom:
        warps.append(_affine(config, draws, height, width))
    if config.crop:
        warps.append(_crop(config, draws, height, width))
    if config.flip:
        if not warps:
            warps.append(np.tile(np.eye(2, 3), (len(draws["flip"]), 1, 1)))
        flipped = draws["flip"] < config.flip
        warps[0][flipped, 0] *= -1.0
        warps[0][flipped, 0, 2] += width - 1
    return warps


def _affine(config: TransformConfig, draws: _Draws, height: int, width: int) -> np.ndarray:
    """The inverse of: scale, then rotate, about the centre; then shift by whole pixels."""
    assert config.rotation is not None and config.zoom is not None
    assert config.translation is not None
    angle = np.deg2rad(draws.between("rotation", -config.rotation, config.rotation))
    scale = draws.between("zoom", 1 - config.zoom, 1 + config.zoom)
    limit = config.translation
    shift_x = np.trunc(draws.between("shift_x", -limit, limit) * width)
    shift_y = np.trunc(draws.between("shift_y", -limit, limit) * height)
    cosine, sine = np.cos(angle) / scale, np.sin(angle) / scale
    centre_x, centre_y = (width - 1) / 2, (height - 1) / 2
    warp = np.empty((len(angle), 2, 3))
    warp[:, 0, 0], warp[:, 0, 1] = cosine, -sine
    warp[:, 1, 0], warp[:, 1, 1] = sine, cosine
    x, y = centre_x + shift_x, centre_y + shift_y
    warp[:, 0, 2] = centre_x - cosine * x + sine * y
    warp[:, 1, 2] = centre_y - sine * x - cosine * y
    return warp


def _crop(config: TransformConfig, draws: _Draws, height: int, width: int) -> np.ndarray:
    """A rectangle of whole pixels, stretched to the whole image."""
    assert config.crop is not None
    areas, ratios = draws.crop_attempts()
    area = height * width * (1.0 - config.crop * areas)
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
    warp = np.zeros((len(fits), 2, 3))
    warp[:, 0, 0], warp[:, 1, 1] = crop_width / width, crop_height / height
    # the centres of pixels are half a pixel from their edges
    warp[:, 0, 2] = left + warp[:, 0, 0] / 2 - 0.5
    warp[:, 1, 2] = top + warp[:, 1, 1] / 2 - 0.5
    return warp


def _erased(chance: float, draws: _Draws, height: int, width: int) -> np.ndarray | None:
    if chance == 0:
        return None
    low, high = ERASED_SIDES
    box_width = np.floor(width * draws.between("erase_width", low, high))
    box_height = np.floor(height * draws.between("erase_height", low, high))
    left = np.floor((width - box_width + 1) * draws["erase_x"])
    top = np.floor((height - box_height + 1) * draws["erase_y"])
    boxes = np.stack([left, top, left + box_width, top + box_height], axis=1).astype(np.int64)
    boxes[draws["erase"] >= chance] = 0
    return boxes
