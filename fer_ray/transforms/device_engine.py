"""The engine `device`: augmentation of whole batches on the device that trains."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch.nn import functional as F

from fer_ray.config.registries import AUGMENTATIONS
from fer_ray.config.transforms import TransformConfig
from fer_ray.transforms import keyed_random
from fer_ray.transforms.operation import BatchContext, Draws, PixelChange, Warp
from fer_ray.transforms.tensors import to_tensor


class DeviceAugmenter:
    """Changes each image of a batch at random."""

    def __init__(self, config: TransformConfig, *, seed: int, fill: int) -> None:
        """Keeps the settings.

        Args:
            config: the magnitudes; mixup and cutmix are not made here.
            seed: the run's seed.
            fill: grey value (0 to 255) of erased rectangles.
        """
        self._magnitudes, self._seed, self._fill = config.magnitudes, seed, fill
        self._changes: list[PixelChange] = [
            augmentation
            for augmentation in AUGMENTATIONS.values()
            if isinstance(augmentation, PixelChange) and augmentation.is_on(self._magnitudes)
        ]

    def __call__(self, images: torch.Tensor, samples: np.ndarray, epoch: int) -> torch.Tensor:
        """Changes each image at random.

        Args:
            images: (N, H, W) uint8, on any device; not modified.
            samples: (N,) each image's index in the train split.
            epoch: the epoch, from 0.

        Returns:
            (N, H, W) uint8, the same for the same (seed, epoch, sample) in any batch, except for
            the rounding of different devices.
        """
        if len(images) == 0:
            return images
        height, width = images.shape[1:]
        draws = Draws(keyed_random.streams(self._seed, epoch, samples))
        context = BatchContext(seed=self._seed, epoch=epoch, samples=samples, fill=self._fill)
        pixels = images
        for warp in draw_warps(self._magnitudes, draws, height, width):
            pixels = _warp(pixels, warp)
        for takes_bytes in (False, True):
            if takes_bytes and pixels.dtype != torch.uint8:
                pixels = pixels.round_().to(torch.uint8)  # each change keeps to 0 to 255
            for change in self._changes:
                if change.takes_bytes is takes_bytes:
                    parameters = change.sample(self._magnitudes, draws, height, width)
                    pixels = change.apply(pixels, parameters, context)
        return pixels


def draw_warps(
    magnitudes: Mapping[str, float], draws: Draws, height: int, width: int
) -> list[np.ndarray]:
    """Draws the warps of a batch, one after the other; exact ones are merged with the next."""
    warps: list[np.ndarray] = []
    is_exact = False
    for augmentation in AUGMENTATIONS.values():
        if isinstance(augmentation, Warp) and augmentation.is_on(magnitudes):
            warp = augmentation.sample(magnitudes, draws, height, width)
            if is_exact:
                warps[-1] = _merged(warps[-1], warp)
            else:
                warps.append(warp)
            is_exact = augmentation.is_exact
    return warps


def _merged(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The warp that does `first` to an image, then `second`: both (N, 2, 3)."""
    merged = first[:, :, :1] * second[:, :1] + first[:, :, 1:2] * second[:, 1:2]
    merged[:, :, 2] += first[:, :, 2]
    return merged


def _warp(images: torch.Tensor, warp: np.ndarray) -> torch.Tensor:
    """Shows at each pixel what lies where `warp` sends it: bilinear, reflected outside."""
    height, width = images.shape[1:]
    # `grid_sample` wants -1 to 1 from the first pixel's centre to the last's
    unit = warp * np.array([[2.0 / max(width - 1, 1)], [2.0 / max(height - 1, 1)]])
    along = unit[:, :, :1] * np.arange(width)
    down = unit[:, :, 1:2] * np.arange(height) + (unit[:, :, 2:] - 1.0)
    # a sum and no matrix product: that rounds differently in batches of different sizes
    device = images.device
    grid = to_tensor(down, device)[:, :, :, None] + to_tensor(along, device)[:, :, None]
    sampled = F.grid_sample(
        images.unsqueeze(1).float(),
        grid.permute(0, 2, 3, 1),
        mode="bilinear",
        padding_mode="reflection",
        align_corners=True,
    )
    return sampled.squeeze(1)
