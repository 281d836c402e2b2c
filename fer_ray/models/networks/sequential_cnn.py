"""The baseline: a plain convolutional network, as in countless notebooks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fer_ray.config.fields import number
from fer_ray.config.model import ModelConfig
from fer_ray.config.registries import MODELS
from fer_ray.errors import UserError


@MODELS.register("sequential_cnn")
@dataclass(frozen=True, kw_only=True)
class SequentialCNNConfig(ModelConfig):
    """Three convolutions with pooling and two dense layers: shows what the others gain."""

    has_batch_norm = False

    dropout: float = number(0.5, 0, 0.95)
    """Probability of dropout before the classifier."""

    def build(self, *, num_classes: int, input_size: int) -> nn.Module:
        """Builds the network; the input has to have at least 8 pixels a side."""
        layers: list[nn.Module] = []
        channels, size = 1, input_size
        for outputs in (32, 64, 128):
            layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
            channels, size = outputs, size // 2
        if size < 1:
            raise UserError(
                f"--input-size: {input_size} is too small for sequential_cnn; give 8 or more"
            )
        return nn.Sequential(
            *layers,
            nn.Flatten(),
            nn.Linear(channels * size * size, 128),
            nn.ReLU(),
            nn.Dropout(self.dropout),
            nn.Linear(128, num_classes),
        )
