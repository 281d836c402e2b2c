"""This project's own network for 48x48 grey faces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fer_ray.config.fields import Search, choice, number
from fer_ray.config.model import ModelConfig
from fer_ray.config.registries import MODELS

SETTINGS = {"small": (32, 1), "full": (64, 2)}
"""Width and depth of each setting."""

_SMALL_WIDTH = 128


@MODELS.register("custom_cnn")
@dataclass(frozen=True, kw_only=True)
class CustomCNNConfig(ModelConfig):
    """A residual network with a stem at full size and four stages."""

    setting: str = choice("small", tuple(SETTINGS), flag="model-setting")
    """`small` (width 32, depth 1) trains on two CPU cores, `full` (width 64, depth 2) is for a
    GPU."""
    width: int | None = number(None, 1, 512, search=Search(factors=(0.5, 1.5)))
    """Channels of the first stage, doubled by each later one; by default the setting's."""
    depth: int | None = number(None, 1, 16)
    """Residual blocks in each stage; by default the setting's."""
    dropout: float = number(0.0, 0, 0.95)
    """Probability of dropout before the classifier."""

    def derived(self) -> dict[str, Any]:
        """The setting's width and depth."""
        width, depth = SETTINGS.get(self.setting, (None, None))
        return {"width": width, "depth": depth}

    @property
    def is_small(self) -> bool:
        """Whether the channels are few enough for an image to take well under a second."""
        assert self.width is not None
        return self.width <= _SMALL_WIDTH

    def build(self, *, num_classes: int, input_size: int) -> nn.Module:
        """Builds the network for any input size."""
        assert self.width is not None and self.depth is not None
        return CustomCNN(
            width=self.width, depth=self.depth, dropout=self.dropout, num_classes=num_classes
        )

    @classmethod
    def variants(cls) -> list[tuple[str, CustomCNNConfig]]:
        """Both settings."""
        return [(f"custom_cnn ({setting})", cls(setting=setting)) for setting in SETTINGS]


class ConvNorm(nn.Sequential):
    """A 3x3 (or 1x1) convolution without bias, then batch norm."""

    def __init__(self, inputs: int, outputs: int, *, size: int = 3, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False),
            nn.BatchNorm2d(outputs),
        )


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2015, arXiv:1512.03385).

    Where the shape changes, the shortcut averages before its 1x1 convolution (ResNet-D, He et
    al. 2018, arXiv:1812.01187), so that no pixel goes unseen: at 48 pixels each one counts.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = ConvNorm(inputs, outputs, stride=stride)
        self.second = ConvNorm(outputs, outputs)
        shortcut: list[nn.Module] = []
        if stride > 1:
            # rounds up as the convolution does, and is the plain mean for even sizes
            shortcut.append(nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False))
        if stride > 1 or inputs != outputs:
            shortcut.append(ConvNorm(inputs, outputs, size=1))
        self.shortcut = nn.Sequential(*shortcut)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(self.activation(self.first(x)))
        return self.activation(y.add_(self.shortcut(x)))


class CustomCNN(nn.Module):
    """This project's network for 48x48 grey faces.

    A stem at full size, since eyes and mouths are a few pixels; four residual stages, each but
    the first halving the size and doubling the channels (48, 24, 12, 6); the mean over the
    last map; a linear classifier.
    """

    def __init__(self, *, width: int, depth: int, dropout: float, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(ConvNorm(1, width), nn.ReLU(inplace=True))
        blocks: list[nn.Module] = []
        channels = width
        for stage in range(4):
            for block in range(depth):
                outputs = width * 2**stage
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(ResidualBlock(channels, outputs, stride))
                channels = outputs
        self.stages = nn.Sequential(*blocks)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(channels, num_classes)
        _initialize_convolutions(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stages(self.stem(x))
        return self.classifier(self.dropout(x.mean(dim=(2, 3))))


def _initialize_convolutions(model: nn.Module) -> None:
    """He et al.'s normal initialization (arXiv:1502.01852) of every convolution."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
