"""EfficientNet-B2 (Tan and Le 2019, arXiv:1905.11946), torchvision's, for grey images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from fer_ray.config.fields import choice, file, number
from fer_ray.config.model import ModelConfig
from fer_ray.config.registries import MODELS
from fer_ray.errors import UserError

HEADS = ("linear", "hidden")
IMAGENET = "imagenet"
"""The value of `weights` that stands for torchvision's download."""

_HIDDEN_UNITS = 256


@MODELS.register("efficientnet_b2")
@dataclass(frozen=True, kw_only=True)
class EfficientNetB2Config(ModelConfig):
    """torchvision's EfficientNet-B2 for one channel."""

    # bfloat16's backward pass of depthwise convolutions is several times slower than float32's
    # on CPUs (torch 2.15)
    faster_in_bfloat16 = False
    faster_compiled = True

    dropout: float = number(0.3, 0, 0.95)
    """Probability of dropout before the classifier; by default as published."""
    stochastic_depth: float = number(0.2, 0, 0.95)
    """Probability of leaving out the last block in training, less for earlier ones; by default
    as published."""
    head: str = choice("linear", HEADS)
    """`linear` as published, or `hidden`: a layer of 256 units before it."""
    weights: str = file(names=(IMAGENET,))
    """Initial weights: `imagenet` (torchvision's download) or a file of torchvision's weights;
    empty: from scratch."""

    def build(self, *, num_classes: int, input_size: int) -> nn.Module:
        """Builds the network for any input size."""
        from torchvision.models import efficientnet_b2

        model = efficientnet_b2(stochastic_depth_prob=self.stochastic_depth)
        if self.weights:
            _load_published(model, self.weights)
        else:
            _initialize_depthwise(model)
        _take_grey_images(model, is_pretrained=bool(self.weights))
        features = model.classifier[1].in_features
        if self.head == "hidden":
            model.classifier = nn.Sequential(
                nn.Linear(features, _HIDDEN_UNITS),
                nn.ReLU(inplace=True),
                nn.Dropout(self.dropout),
                nn.Linear(_HIDDEN_UNITS, num_classes),
            )
        else:
            model.classifier = nn.Sequential(
                nn.Dropout(self.dropout), nn.Linear(features, num_classes)
            )
        return model

    @classmethod
    def variants(cls) -> list[tuple[str, EfficientNetB2Config]]:
        """Both heads, at the size of the images, at 96 pixels, and at the published size."""
        return [
            (f"efficientnet_b2 ({head})", cls(head=head, input_size=size))
            for head in HEADS
            for size in (0, 96, 260)
        ]


def _take_grey_images(model: Any, *, is_pretrained: bool) -> None:
    """Replaces the first convolution, which takes three channels, with one that takes one."""
    stem = model.features[0][0]
    grey = nn.Conv2d(1, stem.out_channels, 3, stride=2, padding=1, bias=False)
    with torch.no_grad():
        # a grey image is three equal channels: their kernels add up. Fresh ones are scaled
        # back to the variance that one channel asks for.
        kernels = stem.weight.sum(dim=1, keepdim=True)
        grey.weight.copy_(kernels if is_pretrained else kernels / math.sqrt(3))
    model.features[0][0] = grey


def _initialize_depthwise(model: nn.Module) -> None:
    """Gives depthwise kernels the variance that their few connections ask for.

    torchvision counts every channel as an output of each, which makes these kernels up to
    sqrt(channels) times too small: batch norm hides that from the forward pass, but their
    gradients grow by the same factor, and a step that suits the other layers tears them apart.
    The published code counts one output a channel (tensorflow/tpu, `conv_kernel_initializer`).
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1:
            fan_out = module.kernel_size[0] * module.kernel_size[1]
            nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))


def _load_published(model: nn.Module, weights: str) -> None:
    from torchvision.models import EfficientNet_B2_Weights

    if weights == IMAGENET:
        try:
            state = EfficientNet_B2_Weights.IMAGENET1K_V1.get_state_dict(progress=False)
        except OSError as error:
            raise UserError(
                f"--weights imagenet: the download failed ({error}); fetch the file where there "
                "is a network and name it instead"
            ) from error
    elif not Path(weights).is_file():
        raise UserError(f"--weights: no file at {weights}; 'imagenet' or a file is allowed")
    else:
        state = _read_weights(weights)
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError) as error:  # another network's, or no dict at all
        raise UserError(f"--weights: {weights} does not hold EfficientNet-B2's weights") from error


def _read_weights(path: str) -> Any:
    """What a file of weights holds; nothing of it is run."""
    try:
        if path.endswith(".safetensors"):
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"--weights: {path}: {error}") from error
    except Exception as error:  # readers of damaged files raise nearly anything
        raise UserError(
            f"--weights: {path} is damaged, or neither a .safetensors file nor one that "
            "torch.save wrote from a dict of tensors"
        ) from error
