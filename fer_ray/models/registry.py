"""Building networks, whatever is registered, and what they cost. All take grey images."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from fer_ray.config.model import ModelConfig
from fer_ray.config.registries import MODELS
from fer_ray.errors import UserError

_SMALL_INPUT = 128
"""Up to this size in pixels, one image takes well under a second."""


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
        image_size: height and width of the prepared images in pixels, used where
            `config.input_size` is 0.

    Returns:
        A module from (N, 1, S, S) float to (N, num_classes) logits, S being the input size.

    Raises:
        UserError: for a weights file that is missing or does not fit.
    """
    return config.build(num_classes=num_classes, input_size=config.input_size or image_size)


@contextlib.contextmanager
def at_most_parameters(limit: int) -> Iterator[None]:
    """Refuses, in its block, networks with more parameters, before memory for them is filled.

    Raises:
        UserError: as soon as more than `limit` parameters have been created.
    """
    total = 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal total
        total += 0 if parameter is None else parameter.numel()
        if total > limit:
            raise UserError(f"the network has more than {limit:,} parameters")

    handle = nn.modules.module.register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def check(config: ModelConfig, *, num_classes: int, image_size: int) -> nn.Module:
    """Checks with one image that a network can be built and takes its input.

    Returns:
        The network that was checked, for a look at its layers; not to be trained.

    Raises:
        UserError: for weights that are missing or do not fit, or an input size that does not.
    """
    fresh = config.with_fresh_weights()
    if fresh != config:  # downloads or reads the file once, here and not in every worker
        build(config, num_classes=num_classes, image_size=image_size)
    size = config.input_size or image_size
    # on "meta" nothing is computed, but half of torch's compiler is imported for it: 2 seconds
    device = torch.device("cpu" if size <= _SMALL_INPUT and config.is_small else "meta")
    with torch.random.fork_rng(devices=[]), device, torch.no_grad():
        model = build(fresh, num_classes=num_classes, image_size=image_size).eval()
        try:
            model(torch.zeros(1, 1, size, size))
        except RuntimeError as error:
            raise UserError(f"--input-size: {config.name} cannot take {size} px") from error
    return model


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
    """Title, input size in pixels and cost of every variant of every network."""
    costs = []
    for network in (MODELS[name] for name in MODELS):
        for title, config in network.variants():
            size = config.input_size or image_size
            model = build(config, num_classes=num_classes, image_size=image_size)
            costs.append((title, size, cost(model, size)))
    return costs
