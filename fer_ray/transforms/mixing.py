"""Mixup and cutmix: each image of a batch is mixed with another one, after normalization.

Mixup blends whole images (Zhang et al. 2017, arXiv:1710.09412), cutmix puts a rectangle of one
into the other (Yun et al. 2019, arXiv:1905.04899). The targets are mixed in the same
proportions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fer_ray.config.transforms import TransformConfig


@dataclass(frozen=True, kw_only=True)
class Mix:
    """How each of N images is mixed."""

    partner: torch.Tensor
    """(N,) int64: position of the other image in the batch that `apply` gets."""
    blend: torch.Tensor
    """(N, 1, 1, 1) float32: the image's own fraction where it is blended; 1: not."""
    box: torch.Tensor
    """(N, 4) int64: left, top, right, bottom of the other image's rectangle; empty: none."""
    own_fraction: torch.Tensor
    """(N,) float32, 0 to 1: how much of the target is the image's own."""

    def apply(self, batch: torch.Tensor) -> torch.Tensor:
        """Mixes the first N images of a batch (M, C, H, W) float32; M is N or more."""
        own, other = batch[: len(self.partner)], batch[self.partner]
        height, width = batch.shape[2:]
        left, top, right, bottom = self.box.view(-1, 4, 1, 1, 1).unbind(1)
        x = torch.arange(width, device=batch.device)
        y = torch.arange(height, device=batch.device).view(-1, 1)
        inside = (x >= left) & (x < right) & (y >= top) & (y < bottom)
        blended = torch.lerp(other, own, self.blend.to(batch.dtype))
        return torch.where(inside, other, blended)


@dataclass(frozen=True, kw_only=True)
class MixPlan:
    """The mixing of one global batch, on the CPU. Made by `draw_mix`."""

    partner: np.ndarray
    """(B,) int64 positions in the global batch."""
    blend: np.ndarray
    """(B,) float64."""
    box: np.ndarray
    """(B, 4) int64."""
    own_fraction: np.ndarray
    """(B,) float64."""

    def needed(self, own: slice) -> np.ndarray:
        """Positions whose images a worker needs: its own first, then partners elsewhere."""
        mine = np.arange(own.start, own.stop)
        others = np.setdiff1d(self.partner[own], mine)
        return np.concatenate([mine, others])

    def of(self, own: slice, device: torch.device) -> Mix:
        """The part of a worker, whose batch holds the images of `needed`, in that order."""
        needed = self.needed(own)
        order = np.argsort(needed)
        positions = order[np.searchsorted(needed[order], self.partner[own])]

        def move(values: np.ndarray) -> torch.Tensor:
            tensor = torch.from_numpy(values)
            if device.type == "cpu":
                return tensor
            return tensor.pin_memory().to(device, non_blocking=True)

        return Mix(
            partner=move(positions),
            blend=move(self.blend[own].astype(np.float32).reshape(-1, 1, 1, 1)),
            box=move(self.box[own]),
            own_fraction=move(self.own_fraction[own].astype(np.float32)),
        )


def draw_mix(
    config: TransformConfig, key: tuple[int, ...], count: int, size: int
) -> MixPlan | None:
    """Draws the mixing of one global batch; None where mixup and cutmix are off.

    Args:
        config: the magnitudes.
        key: what decides the numbers: seed, epoch, step.
        count: images in the global batch.
        size: pixels a side of the network's input.
    """
    mixup, cutmix = config.magnitudes["mixup"], config.magnitudes["cutmix"]
    if not (mixup or cutmix):
        return None
    # the last number keeps these draws apart from others: (seed, epoch) is (seed, epoch, 0, 0)
    random = np.random.default_rng((*key, 1))
    partner = random.permutation(count)
    by_cutmix = random.random(count) < (cutmix > 0) * (0.5 if mixup else 1.0)
    blend = random.beta(mixup, mixup, count) if mixup else np.ones(count)
    box = np.zeros((count, 4), np.int64)
    own_fraction = blend.copy()
    if cutmix:
        cut = _boxes(random.beta(cutmix, cutmix, count), random, size)
        box[by_cutmix] = cut[by_cutmix]
        blend[by_cutmix] = 1.0
        area = (cut[:, 2] - cut[:, 0]) * (cut[:, 3] - cut[:, 1])
        # the rectangle may be cut off at the border: its fraction is what is left of it
        own_fraction[by_cutmix] = (1.0 - area / size**2)[by_cutmix]
    return MixPlan(partner=partner, blend=blend, box=box, own_fraction=own_fraction)


def _boxes(own_fraction: np.ndarray, random: np.random.Generator, size: int) -> np.ndarray:
    """Squares of area 1 - `own_fraction` about any pixel, cut off at the border: (N, 4)."""
    side = np.floor(size * np.sqrt(1.0 - own_fraction)).astype(np.int64)
    left = random.integers(0, size, len(side)) - side // 2
    top = random.integers(0, size, len(side)) - side // 2
    corners = np.stack([left, top, left + side, top + side], axis=1)
    return corners.clip(0, size)
