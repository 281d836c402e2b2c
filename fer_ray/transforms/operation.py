"""What an augmentation is: options with magnitudes, random parameters, and a change of pixels.

An augmentation registers itself in `fer_ray.config.registries.AUGMENTATIONS`, in a module of
`fer_ray.transforms.augmentations` or in a plugin. Flags, presets, sweeps, the page of
augmentations and both engines then know it by its options.
"""

from __future__ import annotations

import abc
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from fer_ray.transforms import keyed_random


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option of an augmentation: a magnitude from 0, which is off, to `high`."""

    name: str
    """Name of the setting, its flag and its column."""
    doc: str
    """What the magnitude means, with its unit: the help of the flag."""
    high: float
    """Largest magnitude that is allowed."""
    usual: float
    """A usual magnitude: what the preset sweep `augmentation` adds, and what the page shows."""
    search_high: float
    """Largest magnitude that the preset sweep `search` draws."""


class Draws:
    """Uniform random numbers for a batch: (N,) float64, from 0 to below 1, by name of use.

    What a use draws depends on its name alone: switching one option does not change what the
    others draw.
    """

    _COLUMNS = (
        *("flip", "rotation", "shift_x", "shift_y", "zoom", "crop_x", "crop_y"),
        *("brightness", "contrast", "blur", "blur_sigma", "noise", "noise_sigma"),
        *("erase", "erase_width", "erase_height", "erase_x", "erase_y"),
        *(f"crop_{what}_{attempt}" for attempt in range(10) for what in ("area", "ratio")),
    )
    """Uses that share a stream, in the order of their numbers; any other use has its own."""

    def __init__(self, starts: np.ndarray) -> None:
        """Takes (N,) uint64 from `keyed_random.streams`."""
        self._starts = starts
        self._shared = keyed_random.uniforms(starts, len(self._COLUMNS))

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, use: str) -> np.ndarray:
        if use in self._COLUMNS:
            return self._shared[:, self._COLUMNS.index(use)]
        own = keyed_random.substreams(self._starts, zlib.crc32(use.encode()))
        return keyed_random.uniforms(own, 1)[:, 0]

    def between(self, use: str, low: float, high: float) -> np.ndarray:
        """Numbers from `low` to below `high`."""
        return low + (high - low) * self[use]


@dataclass(frozen=True, kw_only=True)
class BatchContext:
    """What a change of pixels may need to know about a batch."""

    seed: int
    """The run's seed."""
    epoch: int
    """The epoch, from 0."""
    samples: np.ndarray
    """(N,) each image's index in the train split."""
    fill: int
    """Grey value (0 to 255) for what is erased."""


class Augmentation(abc.ABC):
    """A random change of each image of a batch. One of its subclasses below is to be derived."""

    position: ClassVar[int]
    """Where in the order of all augmentations it stands; the project's own are multiples of 10."""
    options: ClassVar[tuple[Option, ...]]
    """What can be set."""
    in_albumentations: ClassVar[bool] = False
    """Whether the engine `albumentations` makes it too (`fer_ray.transforms.albumentations_engine`
    knows the project's own; others define `albumentations_steps`)."""

    def is_on(self, magnitudes: Mapping[str, float]) -> bool:
        """Whether any of its magnitudes is above 0."""
        return any(magnitudes[option.name] for option in self.options)

    def albumentations_steps(
        self, magnitudes: Mapping[str, float], *, image_size: int, fill: int
    ) -> list[Any]:
        """Transforms of albumentations that do the same, where `in_albumentations` is True."""
        raise NotImplementedError


class Warp(Augmentation):
    """An augmentation that moves pixels: they are interpolated once for each."""

    is_exact: ClassVar[bool] = False
    """Whether it moves whole pixels: then it is merged with the warp that follows it."""

    @abc.abstractmethod
    def sample(
        self, magnitudes: Mapping[str, float], draws: Draws, height: int, width: int
    ) -> np.ndarray:
        """Draws a warp for each image.

        Returns:
            (N, 2, 3) float64: from an output pixel (x, y, 1) to the pixel (x, y) that it shows.
        """


class PixelChange(Augmentation):
    """An augmentation that changes grey levels."""

    takes_bytes: ClassVar[bool] = False
    """Whether it takes and gives uint8, after all that compute with float32."""

    @abc.abstractmethod
    def sample(
        self, magnitudes: Mapping[str, float], draws: Draws, height: int, width: int
    ) -> np.ndarray:
        """Draws parameters for each image: an array whose first axis is (N,)."""

    @abc.abstractmethod
    def apply(
        self, pixels: torch.Tensor, parameters: np.ndarray, context: BatchContext
    ) -> torch.Tensor:
        """Changes a batch.

        Args:
            pixels: (N, H, W), 0 to 255: float32, or uint8 as the images are; may be modified
                only if it is float32.
            parameters: from `sample`.
            context: the batch.

        Returns:
            The same shape, 0 to 255; image by image the same in any batch.
        """


class Mixing(Augmentation):
    """An augmentation that mixes images of a batch (`fer_ray.transforms.mixing`)."""
