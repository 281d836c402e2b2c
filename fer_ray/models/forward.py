"""From grey bytes to probabilities: the path that training, validation and inference share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fer_ray.models import precision
from fer_ray.transforms.mixing import Mix
from fer_ray.transforms.normalization import Normalizer


@dataclass(frozen=True, kw_only=True)
class Forward:
    """How a batch of images goes through a network."""

    normalizer: Normalizer
    """Turns bytes into the network's input."""
    input_size: int
    """Height and width of the network's input in pixels; 0: those of the images."""
    precision: str
    """In which arithmetic it computes, one of `precision.ORDER`."""
    flip_at_test: bool
    """Whether `probabilities` averages each image and its mirror image."""

    def logits(
        self, model: nn.Module, images: torch.Tensor, mix: Mix | None = None
    ) -> torch.Tensor:
        """Logits (N, classes) float32 of images (N, H, W) uint8 on the model's device.

        With `mix`, only the first images go through the network; the others are mixed in.
        """
        batch = resize(self.normalizer(images), self.input_size)
        if mix is not None:
            batch = mix.apply(batch)
        return self._run(model, batch)

    @torch.inference_mode()
    def probabilities(self, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        """Probabilities (N, classes) float32, each row adding up to 1, without gradients.

        Args:
            model: in evaluation mode.
            images: (N, H, W) uint8 on the model's device.
        """
        batch = resize(self.normalizer(images), self.input_size)
        result = self._run(model, batch).softmax(dim=1)
        if self.flip_at_test:
            result = (result + self._run(model, batch.flip(3)).softmax(dim=1)) / 2
        return result

    def _run(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        batch = batch.contiguous(memory_format=torch.channels_last)
        with precision.autocast(batch.device, self.precision):
            return model(batch).float()


def resize(batch: torch.Tensor, size: int) -> torch.Tensor:
    """Scales a batch (N, C, H, W) to `size` x `size` pixels: bilinear, antialiased when shrinking.

    Returns the batch itself where it has that size already, or `size` is 0.
    """
    if size in (0, batch.shape[-1]) and batch.shape[-1] == batch.shape[-2]:
        return batch
    return torch.nn.functional.interpolate(
        batch, size=(size, size), mode="bilinear", antialias=True, align_corners=False
    )
