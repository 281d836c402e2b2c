"""Augmentation of whole batches on the device that trains: one pass a kind of change."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from fer_ray.config.schema import TransformConfig
from fer_ray.transforms import keyed_random, sampling

_BLUR_REACH = 3.5
"""Half the width of a blur's kernel in deviations, as albumentations has it."""


class DeviceAugmenter:
    """The `device` engine: random changes of its own to each image of a batch."""

    def __init__(self, config: TransformConfig, *, seed: int, fill: int) -> None:
        """Keeps the settings.

        Args:
            config: the strengths; mixup and cutmix are not done here.
            seed: the run's seed.
            fill: grey value (0 to 255) of erased rectangles.
        """
        self._config, self._seed, self._fill = config, seed, fill

    def __call__(self, images: torch.Tensor, samples: np.ndarray, epoch: int) -> torch.Tensor:
        """Changes each image at random.

        Args:
            images: (N, H, W) uint8, on any device; not modified.
            samples: (N,) each image's index in the train split.
            epoch: the epoch, from 0.

        Returns:
            (N, H, W) uint8, the same for the same (seed, epoch, sample) in any batch, but for
            the rounding of different devices.
        """
        if len(images) == 0:
            return images
        starts = keyed_random.streams(self._seed, epoch, samples)
        drawn = sampling.draw(self._config, starts, *images.shape[1:])
        pixels = images
        for warp in drawn.warps:
            pixels = _warp(pixels, warp)
        if drawn.brightness is not None:
            pixels = pixels + _column(drawn.brightness, pixels)
            pixels.clamp_(0.0, 255.0)
        if drawn.contrast is not None:
            pixels = pixels.float()
            mean = pixels.mean(dim=(1, 2), keepdim=True)
            pixels = ((pixels - mean) * _column(drawn.contrast, pixels) + mean).clamp_(0.0, 255.0)
        if drawn.blur is not None:
            pixels = _blur(pixels.float(), drawn.blur)
        if drawn.noise is not None:
            noise_starts = keyed_random.streams(self._seed, epoch, samples, purpose=1)
            pixels = _add_noise(pixels.float(), drawn.noise, noise_starts)
        if pixels.dtype != torch.uint8:
            pixels = pixels.round_().to(torch.uint8)  # each step above keeps to 0 to 255
        if drawn.erased is not None:
            pixels = _erase(pixels, drawn.erased, self._fill)
        return pixels


def _warp(images: torch.Tensor, warp: np.ndarray) -> torch.Tensor:
    """Shows at each pixel what lies where `warp` sends it: bilinear, reflected outside."""
    height, width = images.shape[1:]
    # `grid_sample` wants -1 to 1 from the first pixel's centre to the last's
    unit = warp * np.array([[2.0 / max(width - 1, 1)], [2.0 / max(height - 1, 1)]])
    along = unit[:, :, :1] * np.arange(width)
    down = unit[:, :, 1:2] * np.arange(height) + (unit[:, :, 2:] - 1.0)
    # a sum and no matrix product: that rounds differently in batches of different sizes
    grid = _tensor(down, images.device)[:, :, :, None] + _tensor(along, images.device)[:, :, None]
    sampled = F.grid_sample(
        images.unsqueeze(1).float(),
        grid.permute(0, 2, 3, 1),
        mode="bilinear",
        padding_mode="reflection",
        align_corners=True,
    )
    return sampled.squeeze(1)


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a device; a GPU is not waited for."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def _tensor(values: np.ndarray, device: torch.device) -> torch.Tensor:
    return _moved(torch.from_numpy(values.astype(np.float32)), device)


def _indices(chosen: np.ndarray, device: torch.device) -> torch.Tensor:
    return _moved(torch.from_numpy(np.flatnonzero(chosen)), device)


def _column(values: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return _tensor(values, like.device).view(-1, 1, 1)


def _blur(pixels: torch.Tensor, sigmas: np.ndarray) -> torch.Tensor:
    """Gaussian blur (N, H, W) float32, each image with its own deviation; 0: none."""
    reach = (_BLUR_REACH * sigmas).astype(int)  # 0: the kernel is the pixel alone
    chosen = reach > 0
    if not chosen.any():
        return pixels
    sigmas, reach = sigmas[chosen], reach[chosen]
    # reflection needs pixels to reflect: tiny images get a narrower kernel
    limit = min(int(reach.max()), min(pixels.shape[1:]) - 1)
    if limit < 1:
        return pixels
    offsets = np.arange(-limit, limit + 1)
    kernels = np.exp(-0.5 * (offsets / sigmas[:, None]) ** 2) * (abs(offsets) <= reach[:, None])
    weights = _tensor(kernels / kernels.sum(1, keepdims=True), pixels.device)[:, :, None, None]
    rows = _indices(chosen, pixels.device)
    height, width = pixels.shape[1:]
    padded = F.pad(pixels[rows].unsqueeze(1), [limit] * 4, mode="reflect").squeeze(1)
    # a sum of shifted images: a convolution with kernels of its own for each image is slower
    across = sum(weights[:, k] * padded[:, :, k : k + width] for k in range(2 * limit + 1))
    assert isinstance(across, torch.Tensor)
    along = sum(weights[:, k] * across[:, k : k + height] for k in range(2 * limit + 1))
    assert isinstance(along, torch.Tensor)
    return pixels.index_copy(0, rows, along.clamp_(0.0, 255.0))


def _add_noise(pixels: torch.Tensor, sigmas: np.ndarray, starts: np.ndarray) -> torch.Tensor:
    """Adds Gaussian noise of each image's deviation, in grey levels, and clips."""
    chosen = sigmas > 0
    if not chosen.any():
        return pixels
    height, width = pixels.shape[1:]
    rows = _indices(chosen, pixels.device)
    keys = _moved(torch.from_numpy(starts[chosen].view(np.int64)), pixels.device)
    even = height * width + height * width % 2
    noise = keyed_random.normals(keys, even)[:, : height * width].view(-1, height, width)
    noisy = pixels[rows] + noise * _column(sigmas[chosen], pixels)
    return pixels.index_copy(0, rows, noisy.clamp_(0.0, 255.0))


def _erase(pixels: torch.Tensor, boxes: np.ndarray, fill: int) -> torch.Tensor:
    """Sets a rectangle of each image (N, H, W) uint8 to `fill`."""
    height, width = pixels.shape[1:]
    x, y = np.arange(width), np.arange(height)
    columns = (x >= boxes[:, :1]) & (x < boxes[:, 2:3])
    rows = (y >= boxes[:, 1:2]) & (y < boxes[:, 3:4])
    along = _moved(torch.from_numpy(columns.astype(np.uint8)), pixels.device)[:, None]
    down = _moved(torch.from_numpy(rows.astype(np.uint8)), pixels.device)[:, :, None]
    # arithmetic modulo 256: on a CPU three times as fast as a mask
    return pixels + along * down * (fill - pixels)
