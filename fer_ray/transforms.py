"""What happens to the pixels: augmentation of grey images, then normalization of batches.

Augmentation takes and gives uint8, so that every normalization sees it the same way. Its
randomness is keyed by (seed, epoch, sample): it depends neither on the number of workers nor
on the order of the images, and a resumed run repeats it exactly.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fer_ray.config import NORMALIZATIONS
from fer_ray.errors import unknown


@dataclass(frozen=True, kw_only=True)
class Normalizer:
    """Turns grey bytes into the numbers that a network sees; it travels in the checkpoint."""

    normalization: str
    """One of `config.NORMALIZATIONS`."""
    mean: float
    """Mean of the train split's pixels, in units of 1.0; used by ``dataset`` alone."""
    std: float
    """Standard deviation of the train split's pixels, in units of 1.0; above 0."""

    def __post_init__(self) -> None:
        if self.normalization not in NORMALIZATIONS:
            raise unknown("--normalization", self.normalization, NORMALIZATIONS)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Normalizes a batch on the device it lies on; deterministic, image by image.

        Args:
            images: (N, H, W) uint8.

        Returns:
            (N, 1, H, W) float32: ``none`` in [0, 1]; ``minmax`` in [0, 1], touching both ends,
            all zeros for a constant image; ``dataset`` with mean 0 and deviation 1 over the
            train split. Never not-a-number.
        """
        pixels = images.unsqueeze(1).float()
        if self.normalization == "minmax":
            low = pixels.amin(dim=(2, 3), keepdim=True)
            span = pixels.amax(dim=(2, 3), keepdim=True) - low
            return (pixels - low) / span.clamp(min=1.0)
        pixels = pixels / 255.0
        if self.normalization == "dataset":
            pixels = (pixels - self.mean) / max(self.std, 1e-6)
        return pixels


def resize(batch: torch.Tensor, size: int) -> torch.Tensor:
    """Scales a batch (N, C, H, W) to `size` pixels a side, bilinear, antialiased when shrinking.

    A batch of that size already, and `size` 0, come back as they are.
    """
    if size in (0, batch.shape[-1]) and batch.shape[-1] == batch.shape[-2]:
        return batch
    return torch.nn.functional.interpolate(
        batch, size=(size, size), mode="bilinear", antialias=True, align_corners=False
    )


class Augmenter:
    """A preset of random changes, applied image by image through albumentations."""

    def __init__(self, preset: str, *, seed: int, fill: int) -> None:
        """Builds the pipeline.

        Args:
            preset: one of `config.AUGMENTATIONS`.
            seed: the run's seed.
            fill: grey value (0 to 255) that erased rectangles get; the train split's mean, so
                that erasing moves neither the minimum nor the maximum of an image.
        """
        self._pipeline = _pipeline(preset, fill)
        self._seed = seed

    def __call__(
        self, images: np.ndarray, samples: Sequence[int] | np.ndarray, epoch: int
    ) -> np.ndarray:
        """Changes each image at random.

        Args:
            images: (N, H, W) uint8; not modified.
            samples: each image's index in the train split.
            epoch: the epoch, from 0.

        Returns:
            (N, H, W) uint8, the same for the same (seed, epoch, sample) in any batch.
        """
        if self._pipeline is None:
            return images
        changed = np.empty_like(images)
        for row, sample in enumerate(samples):
            generator = np.random.default_rng((self._seed, epoch, int(sample)))
            # `set_random_seed` would give every step the same stream, and so correlated
            # choices (flipped images would be the erased ones): share one stream instead.
            self._pipeline.set_random_state(generator, random.Random(generator.bytes(8)))
            changed[row] = self._pipeline(image=images[row])["image"]
        return changed


def _pipeline(preset: str, fill: int) -> Any:
    if preset == "none":
        return None
    import albumentations as A  # takes a second: not before it is needed
    import cv2

    cv2.setNumThreads(1)  # workers share the cores; 48x48 pixels are no work for a pool
    flip = A.HorizontalFlip(p=0.5)
    if preset == "notebook":
        return _compose(
            [
                flip,
                _affine(rotate=36.0, translate=0.1, scale=0.0),
                A.RandomBrightnessContrast(brightness_limit=0.0, contrast_limit=0.1, p=1.0),
            ]
        )
    if preset == "standard":
        erase = A.CoarseDropout(
            num_holes_range=(1, 1),
            hole_height_range=(0.1, 0.4),
            hole_width_range=(0.1, 0.4),
            fill=fill,
            p=0.5,
        )
        return _compose([flip, _affine(rotate=10.0, translate=0.12, scale=0.12), erase])
    from fer_ray.config import AUGMENTATIONS

    raise unknown("--augmentation", preset, AUGMENTATIONS)


def _compose(steps: list[Any]) -> Any:
    import albumentations as A

    return A.Compose(steps, seed=0)


def _affine(*, rotate: float, translate: float, scale: float) -> Any:
    """Rotation by ± degrees, shift by ± a share of the side and scale by ± a share, always."""
    import albumentations as A
    import cv2

    return A.Affine(
        rotate=(-rotate, rotate),
        translate_percent=(-translate, translate),
        scale=(1.0 - scale, 1.0 + scale),
        keep_ratio=True,
        border_mode=cv2.BORDER_REFLECT_101,
        p=1.0,
    )
