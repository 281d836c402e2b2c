"""The engine `albumentations`: augmentation on the CPU, image by image.

This module alone knows that package (2.0.8 is its last release under the MIT licence).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fer_ray.config.registries import AUGMENTATIONS
from fer_ray.config.transforms import TransformConfig
from fer_ray.errors import UserError
from fer_ray.transforms.augmentations import blur, erasing, geometry, noise
from fer_ray.transforms.operation import Mixing


def check(config: TransformConfig) -> None:
    """Refuses augmentations that only the engine `device` makes.

    Raises:
        UserError: with the option's flag.
    """
    if config.engine != "albumentations":
        return
    for augmentation in AUGMENTATIONS.values():
        if augmentation.is_on(config.magnitudes) and not augmentation.in_albumentations:
            flag = "--" + augmentation.options[0].name.replace("_", "-")
            raise UserError(
                f"--engine albumentations: it does not have {flag}: use --engine device"
            )


class AlbumentationsAugmenter:
    """Changes images at random with albumentations."""

    def __init__(self, config: TransformConfig, *, seed: int, fill: int, image_size: int) -> None:
        """Builds the pipeline.

        Args:
            config: the magnitudes; mixup and cutmix are not made here.
            seed: the run's seed.
            fill: grey value (0 to 255) of erased rectangles.
            image_size: height and width of the images in pixels.
        """
        self._pipeline = _pipeline(config.magnitudes, fill, image_size)
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


def fill_of(pixel_mean: float) -> int:
    """Grey value of what is erased: the mean, so that no image's minimum or maximum moves.

    Args:
        pixel_mean: mean of the train split's pixels, 0 to 1.
    """
    return round(pixel_mean * 255)


def _pipeline(magnitudes: Mapping[str, float], fill: int, image_size: int) -> Any:
    import albumentations as A  # takes a second: not before it is needed
    import cv2

    cv2.setNumThreads(1)  # workers share the cores; 48x48 pixels are no work for a pool
    steps: list[Any] = []
    for name, augmentation in AUGMENTATIONS.items():
        if isinstance(augmentation, Mixing) or not augmentation.is_on(magnitudes):
            continue
        if name in _STEPS:
            steps.append(_STEPS[name](magnitudes, image_size, fill))
        else:
            steps += augmentation.albumentations_steps(magnitudes, image_size=image_size, fill=fill)
    return A.Compose(steps, seed=0) if steps else None


def _flip(magnitudes: Mapping[str, float], image_size: int, fill: int) -> Any:
    import albumentations as A

    return A.HorizontalFlip(p=magnitudes["flip"])


def _affine(magnitudes: Mapping[str, float], image_size: int, fill: int) -> Any:
    import albumentations as A
    import cv2

    rotation, translation = magnitudes["rotation"], magnitudes["translation"]
    return A.Affine(
        rotate=(-rotation, rotation),
        translate_percent=(-translation, translation),
        scale=(1.0 - magnitudes["zoom"], 1.0 + magnitudes["zoom"]),
        keep_ratio=True,
        border_mode=cv2.BORDER_REFLECT_101,
        p=1.0,
    )


def _crop(magnitudes: Mapping[str, float], image_size: int, fill: int) -> Any:
    import albumentations as A

    area = (1.0 - magnitudes["crop"], 1.0)
    return A.RandomResizedCrop(
        (image_size, image_size), scale=area, ratio=geometry.CROP_RATIOS, p=1.0
    )


def _brightness(magnitudes: Mapping[str, float], image_size: int, fill: int) -> Any:
    import albumentations as A

    half = 0.5 / 255  # albumentations rounds down
    limits = (half - magnitudes["brightness"], half + magnitudes["brightness"])
    return A.RandomBrightnessContrast(limits, contrast_limit=0.0, p=1.0)


def _contrast(magnitudes: Mapping[str, float], image_size: int, fill: int) -> Any:
    """Scales about each image's mean: `RandomBrightnessContrast` does about black, and
    `ColorJitter` rounds down."""
    import albumentations as A

    limit = magnitudes["contrast"]

    class Contrast(A.ImageOnlyTransform):
        def get_params(self) -> dict[str, Any]:
            return {"factor": self.py_random.uniform(1 - limit, 1 + limit)}

        def apply(self, img: np.ndarray, factor: float, **_: Any) -> np.ndarray:
            mean = img.mean()
            levels = (np.arange(256) - mean) * factor + mean
            return np.rint(levels.clip(0, 255)).astype(np.uint8)[img]

    return Contrast(p=1.0)


def _blur(magnitudes: Mapping[str, float], image_size: int, fill: int) -> Any:
    import albumentations as A

    sigmas = (min(blur.LEAST_SIGMA, magnitudes["blur"]), magnitudes["blur"])
    return A.GaussianBlur(blur_limit=0, sigma_limit=sigmas, p=blur.PROBABILITY)


def _noise(magnitudes: Mapping[str, float], image_size: int, fill: int) -> Any:
    """Gaussian noise: that of `GaussNoise` is rounded towards 0, which makes it weaker."""
    import albumentations as A

    limit = 255.0 * magnitudes["noise"]

    class Noise(A.ImageOnlyTransform):
        def get_params_dependent_on_data(self, params: dict, data: dict) -> dict[str, Any]:
            sigma = self.py_random.uniform(0.0, limit)
            return {"noise": self.random_generator.normal(0.0, sigma, params["shape"])}

        def apply(self, img: np.ndarray, noise: np.ndarray, **_: Any) -> np.ndarray:
            return np.rint((img + noise).clip(0, 255)).astype(np.uint8)

    return Noise(p=noise.PROBABILITY)


def _erasing(magnitudes: Mapping[str, float], image_size: int, fill: int) -> Any:
    import albumentations as A

    sides = {"hole_height_range": erasing.ERASED_SIDES, "hole_width_range": erasing.ERASED_SIDES}
    return A.CoarseDropout(num_holes_range=(1, 1), **sides, fill=fill, p=magnitudes["erasing"])


_STEPS: dict[str, Callable[[Mapping[str, float], int, int], Any]] = {
    "flip": _flip,
    "affine": _affine,
    "crop": _crop,
    "brightness": _brightness,
    "contrast": _contrast,
    "blur": _blur,
    "noise": _noise,
    "erasing": _erasing,
}
"""Transforms that do what the project's own augmentations do, from magnitudes, the size of the
images and the grey value for what is erased."""
