"""The `albumentations` engine: augmentation on the CPU, image by image."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from fer_ray.config.schema import TransformConfig
from fer_ray.transforms.sampling import (
    BLUR_SHARE,
    CROP_RATIOS,
    ERASED_SIDES,
    LEAST_SIGMA,
    NOISE_SHARE,
)


class LibraryAugmenter:
    """Random changes to images, made by albumentations."""

    def __init__(self, config: TransformConfig, *, seed: int, fill: int, image_size: int) -> None:
        """Builds the pipeline.

        Args:
            config: the strengths; mixup and cutmix are not done here.
            seed: the run's seed.
            fill: grey value (0 to 255) of erased rectangles.
            image_size: pixels a side of the images.
        """
        self._pipeline = _pipeline(config, fill, image_size)
        self._seed = seed

    def __call__(
        self, images: np.ndarray, samples: Sequence[int] | np.ndarray, epoch: int
    ) -> np.ndarray:
        """Changes each image at random.

        Args:
            images: (N, S, S) uint8; not modified.
            samples: each image's index in the train split.
            epoch: the epoch, from 0.

        Returns:
            (N, S, S) uint8, the same for the same (seed, epoch, sample) in any batch.
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


def _pipeline(config: TransformConfig, fill: int, image_size: int) -> Any:
    import albumentations as A  # takes a second: not before it is needed
    import cv2

    cv2.setNumThreads(1)  # workers share the cores; 48x48 pixels are no work for a pool
    steps = _geometry(config, image_size)
    if config.brightness:
        half = 0.5 / 255  # albumentations rounds down
        limits = (half - config.brightness, half + config.brightness)
        steps.append(A.RandomBrightnessContrast(limits, contrast_limit=0.0, p=1.0))
    if config.contrast:
        steps.append(_contrast(config.contrast))
    if config.blur:
        sigmas = (min(LEAST_SIGMA, config.blur), config.blur)
        steps.append(A.GaussianBlur(blur_limit=0, sigma_limit=sigmas, p=BLUR_SHARE))
    if config.noise:
        steps.append(_noise(255.0 * config.noise))
    if config.erasing:
        sides = {"hole_height_range": ERASED_SIDES, "hole_width_range": ERASED_SIDES}
        erase = A.CoarseDropout(num_holes_range=(1, 1), **sides, fill=fill, p=config.erasing)
        steps.append(erase)
    return A.Compose(steps, seed=0) if steps else None


def _contrast(limit: float) -> Any:
    """Scales about each image's mean: `RandomBrightnessContrast` does about black, and
    `ColorJitter` rounds down."""
    import albumentations as A

    class Contrast(A.ImageOnlyTransform):
        def get_params(self) -> dict[str, Any]:
            return {"factor": self.py_random.uniform(1 - limit, 1 + limit)}

        def apply(self, img: np.ndarray, factor: float, **_: Any) -> np.ndarray:
            mean = img.mean()
            levels = (np.arange(256) - mean) * factor + mean
            return np.rint(levels.clip(0, 255)).astype(np.uint8)[img]

    return Contrast(p=1.0)


def _noise(limit: float) -> Any:
    """Gaussian noise: that of `GaussNoise` is rounded towards 0, which makes it weaker."""
    import albumentations as A

    class Noise(A.ImageOnlyTransform):
        def get_params_dependent_on_data(self, params: dict, data: dict) -> dict[str, Any]:
            sigma = self.py_random.uniform(0.0, limit)
            return {"noise": self.random_generator.normal(0.0, sigma, params["shape"])}

        def apply(self, img: np.ndarray, noise: np.ndarray, **_: Any) -> np.ndarray:
            return np.rint((img + noise).clip(0, 255)).astype(np.uint8)

    return Noise(p=NOISE_SHARE)


def _geometry(config: TransformConfig, image_size: int) -> list[Any]:
    import albumentations as A
    import cv2

    steps: list[Any] = [A.HorizontalFlip(p=config.flip)] if config.flip else []
    if config.rotation or config.translation or config.zoom:
        assert config.rotation is not None and config.zoom is not None
        assert config.translation is not None
        affine = A.Affine(
            rotate=(-config.rotation, config.rotation),
            translate_percent=(-config.translation, config.translation),
            scale=(1.0 - config.zoom, 1.0 + config.zoom),
            keep_ratio=True,
            border_mode=cv2.BORDER_REFLECT_101,
            p=1.0,
        )
        steps.append(affine)
    if config.crop:
        area = (1.0 - config.crop, 1.0)
        steps.append(
            A.RandomResizedCrop((image_size, image_size), scale=area, ratio=CROP_RATIOS, p=1.0)
        )
    return steps


def fill_of(pixel_mean: float) -> int:
    """Grey value of what is erased: the mean, so that no image's minimum or maximum moves."""
    return round(pixel_mean * 255)
