"""The networks: a plain dict of builders. All take grey images and give logits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from fer_ray.config.schema import HEADS, MODELS, ModelConfig
from fer_ray.errors import UserError, unknown

CUSTOM_CNN_SETTINGS = {"small": (32, 1), "full": (64, 2)}
"""Width and depth of each setting of custom_cnn."""

_SMALL_INPUT, _SMALL_WIDTH = 128, 128
"""Up to these, in pixels and channels, one image takes well under a second."""
_HIDDEN_UNITS = 256
_STOCHASTIC_DEPTH = 0.2  # as published


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a network costs."""

    parameters: int
    """Trainable numbers."""
    multiply_adds: int
    """Multiply-adds of one image's forward pass (convolutions and matrix products)."""


def build(config: ModelConfig, *, num_classes: int, image_size: int) -> nn.Module:
    """Builds a network with fresh weights, drawn from torch's global generator.

    Args:
        config: the model's section of the configuration.
        num_classes: labels of the data set.
        image_size: pixels a side of the prepared images, used where `config.input_size` is 0.

    Returns:
        A module from (N, 1, S, S) float to (N, num_classes) logits, S being `input_size`.

    Raises:
        UserError: for a weights file that is missing or does not fit.
    """
    if config.name not in _BUILDERS:
        raise unknown("--model", config.name, MODELS)
    if config.weights and config.name != "efficientnet_b2":
        raise UserError(f"--weights: {config.name} has no published weights to start from")
    return _BUILDERS[config.name](config, num_classes, config.input_size or image_size)


def check(config: ModelConfig, *, num_classes: int, image_size: int) -> None:
    """Finds out whether a network can be built and takes its input, with one image.

    Raises:
        UserError: for weights that are missing or do not fit, or an input size that does not.
    """
    if config.weights:  # downloads or reads the file once, here and not in every worker
        build(config, num_classes=num_classes, image_size=image_size)
    size = config.input_size or image_size
    plain = dataclasses.replace(config, weights="")
    # on "meta" nothing is computed, but half of torch's compiler is imported for it: 2 seconds
    small = size <= _SMALL_INPUT and config.width <= _SMALL_WIDTH
    device = torch.device("cpu" if small else "meta")
    with torch.random.fork_rng(devices=[]), device, torch.no_grad():
        model = build(plain, num_classes=num_classes, image_size=image_size).eval()
        try:
            model(torch.zeros(1, 1, size, size))
        except RuntimeError as error:
            raise UserError(f"--input-size: {size} px do not suit {config.name}") from error


def cost(model: nn.Module, input_size: int) -> Cost:
    """Counts a network's parameters and multiply-adds for one (1, S, S) image."""
    from torch.utils.flop_counter import FlopCounterMode

    model = model.eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(torch.zeros(1, 1, input_size, input_size))
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Cost(parameters=parameters, multiply_adds=counter.get_total_flops() // 2)


def variants(num_classes: int = 7, image_size: int = 48) -> list[tuple[str, int, Cost]]:
    """Name, input size in pixels and cost of every model and setting."""
    configs = {"sequential_cnn": ModelConfig(name="sequential_cnn")}
    for setting in CUSTOM_CNN_SETTINGS:
        configs[f"custom_cnn ({setting})"] = ModelConfig(name="custom_cnn", setting=setting)
    entries = [(name, config, image_size) for name, config in configs.items()]
    for head in HEADS:
        config = ModelConfig(name="efficientnet_b2", head=head)
        entries += [(f"efficientnet_b2 ({head})", config, size) for size in (image_size, 96, 260)]
    found = []
    for name, config, size in entries:
        model = build(config, num_classes=num_classes, image_size=size)
        found.append((name, size, cost(model, size)))
    return found


def prefers_bfloat16(config: ModelConfig, device: torch.device) -> bool:
    """Whether a device runs a model faster in bfloat16: what ``--precision auto`` goes by.

    GPUs do. CPUs do where they have instructions for it (AMX, AVX512_BF16), but for depthwise
    convolutions, whose bfloat16 backward passes are several times slower than float32's
    (torch 2.15).
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return able and config.name != "efficientnet_b2"


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


def _custom_cnn(config: ModelConfig, num_classes: int, input_size: int) -> nn.Module:
    width, depth = CUSTOM_CNN_SETTINGS[config.setting]
    return CustomCNN(
        width=config.width or width,
        depth=config.depth or depth,
        dropout=0.0 if config.dropout is None else config.dropout,
        num_classes=num_classes,
    )


def _sequential_cnn(config: ModelConfig, num_classes: int, input_size: int) -> nn.Module:
    """Three convolutions with pooling and two dense layers, as in countless notebooks."""
    layers: list[nn.Module] = []
    channels, size = 1, input_size
    for outputs in (32, 64, 128):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        channels, size = outputs, size // 2
    if size < 1:
        raise UserError(f"--input-size: {input_size} is too small for sequential_cnn; 8 or more")
    return nn.Sequential(
        *layers,
        nn.Flatten(),
        nn.Linear(channels * size * size, 128),
        nn.ReLU(),
        nn.Dropout(0.5 if config.dropout is None else config.dropout),
        nn.Linear(128, num_classes),
    )


def _efficientnet_b2(config: ModelConfig, num_classes: int, input_size: int) -> nn.Module:
    """torchvision's EfficientNet-B2 (Tan and Le 2019, arXiv:1905.11946) for one channel."""
    from torchvision.models import efficientnet_b2

    dropout = 0.3 if config.dropout is None else config.dropout
    drop_paths = _STOCHASTIC_DEPTH if config.stochastic_depth is None else config.stochastic_depth
    model = efficientnet_b2(stochastic_depth_prob=drop_paths)
    if config.weights:
        _load_published(model, config.weights)
    else:
        _initialize_depthwise(model)
    stem = model.features[0][0]
    grey = nn.Conv2d(1, stem.out_channels, 3, stride=2, padding=1, bias=False)
    with torch.no_grad():
        # a grey image is three equal channels: their kernels add up. Fresh ones are scaled
        # back to the variance that one channel asks for.
        kernels = stem.weight.sum(dim=1, keepdim=True)
        grey.weight.copy_(kernels if config.weights else kernels / math.sqrt(3))
    model.features[0][0] = grey
    features = model.classifier[1].in_features
    if config.head == "hidden":
        model.classifier = nn.Sequential(
            nn.Linear(features, _HIDDEN_UNITS),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(_HIDDEN_UNITS, num_classes),
        )
    else:
        model.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(features, num_classes))
    return model


def _load_published(model: nn.Module, weights: str) -> None:
    from torchvision.models import EfficientNet_B2_Weights

    if weights == "imagenet":
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


_BUILDERS: dict[str, Callable[[ModelConfig, int, int], nn.Module]] = {
    "custom_cnn": _custom_cnn,
    "efficientnet_b2": _efficientnet_b2,
    "sequential_cnn": _sequential_cnn,
}
