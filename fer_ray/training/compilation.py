"""Compiles the network that trains with `torch.compile`, where a run is long enough for it to pay.

Validation and inference run the network as it is. A compiled network computes the same up to
rounding: whether a run is compiled is therefore stored in its checkpoints, and a resumed run does
as before.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fer_ray.errors import UserError, first_line

FLOPS_THAT_PAY = 2 * 3600 * 50e9
"""Floating-point operations of a training from which ``auto`` compiles: about two hours of a core
of 2020. Compiling took 104 seconds of CPU time for efficientnet_b2, whose step was then 1.10 times
as fast, and 17 seconds for custom_cnn, which it does not make faster (1.00 at width 32, 1.05 at
width 16). What decides is neither the speed of the machine
nor the number of workers: the same settings give the same result."""

_PASSES = 3
"""A training step costs three forward passes: one forward, two backward."""


class CannotCompile(UserError):
    """A run is to be compiled on a host that cannot; raised on every worker."""

    def __init__(self, reason: str | None) -> None:
        """Takes this host's `problem`; None where the reason is that of another host."""
        super().__init__(
            "--compile: a C++ compiler such as g++ and Python's headers are needed and do not work "
            f"on {'this host' if reason else 'the host of another worker'}"
            f"{f' ({reason})' if reason else ''}: install them, or start a run with --compile off"
        )


def pays(network: nn.Module, *, size: int, images: int, device: torch.device) -> bool:
    """Whether ``--compile auto`` compiles a network.

    Only on CPUs, where it was measured, and only where a C++ compiler works. `ModelConfig` says for
    which networks it pays at all.

    Args:
        network: what trains.
        size: height and width of its input in pixels.
        images: train images of the whole run, each counted in every epoch.
        device: where it computes.
    """
    if device.type != "cpu":
        return False
    flops = _PASSES * images * flops_per_image(network, size)
    return flops >= FLOPS_THAT_PAY and problem() is None


def flops_per_image(network: nn.Module, size: int) -> int:
    """Floating-point operations of a forward pass of one image: two for each multiply-add.

    Args:
        network: with one input channel.
        size: height and width of its input in pixels.
    """
    was_training, device = network.training, next(network.parameters()).device
    network.eval()
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.zeros(1, 1, size, size, device=device))
    finally:
        network.train(was_training)
    return counter.get_total_flops()


def problem() -> str | None:
    """Why nothing can be compiled on this host; None where it works."""
    _prepare()
    try:
        torch.compile(_example, options={"force_disable_caches": True})(torch.zeros(8))
    except Exception as error:  # no compiler, no headers of Python, a full disk, ...
        return first_line(error)
    return None


def compiled(network: nn.Module) -> nn.Module:
    """The network as `torch.compile` returns it, which shares its parameters and buffers.

    It compiles when it is first called.
    """
    _prepare()
    # random numbers as without compiling: dropout leaves out the same values
    return torch.compile(network, options={"fallback_random": True})  # type: ignore[return-value]


def _example(values: torch.Tensor) -> torch.Tensor:
    return values * 2 + 1


def _prepare() -> None:
    """Chooses where compiled code is kept between runs, unless the environment already says."""
    # PyTorch would start a process for each core to compile in, which a killed worker leaves
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return
    # PyTorch's own choice, a folder of a known name in /tmp, could be made by somebody else
    with contextlib.suppress(OSError, RuntimeError):  # no home, or one that cannot be written
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        folder = home / "fer_ray" / "compiled"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
