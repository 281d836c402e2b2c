"""Random numbers keyed by (seed, epoch, sample): each image has a stream of its own.

The generator is SplitMix64 (Steele, Lea, Flood 2014, doi:10.1145/2660193.2660195), whose n-th
output is a function of the stream's start and of n alone: whole batches are drawn at once, in
any order, with the same result on every machine.
"""

from __future__ import annotations

import numpy as np
import torch

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1, _SHIFT_1 = 0xBF58476D1CE4E5B9, 30
_MIX_2, _SHIFT_2 = 0x94D049BB133111EB, 27
_SHIFT_3 = 31


def streams(seed: int, epoch: int, samples: np.ndarray, purpose: int = 0) -> np.ndarray:
    """The start of each image's stream.

    Args:
        seed: the run's seed, 0 or more.
        epoch: the epoch, from 0.
        samples: (N,) integers, each image's index in the train split.
        purpose: tells streams for different uses apart.

    Returns:
        (N,) uint64.
    """
    state = np.full(len(samples), purpose, np.uint64)
    for part in (np.uint64(seed), np.uint64(epoch), np.asarray(samples).astype(np.uint64)):
        with np.errstate(over="ignore"):
            state = _mix(state + np.uint64(_GOLDEN)) ^ part
    return _mix(state)


def substreams(starts: np.ndarray, key: int) -> np.ndarray:
    """The start of a further stream of each image, for a use that `key` tells from others.

    Args:
        starts: (N,) uint64 from `streams`.
        key: 0 to 2**32 - 1.

    Returns:
        (N,) uint64.
    """
    return _mix(_mix(starts) ^ np.uint64(key))


def uniforms(starts: np.ndarray, count: int) -> np.ndarray:
    """The first `count` numbers of each stream: (N, count) float64, from 0 to below 1."""
    with np.errstate(over="ignore"):
        steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
        bits = _mix(starts[:, None] + steps)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normals(starts: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` standard normal numbers of each stream, on the device of `starts`.

    Two come from the halves of one 64-bit output by the transform of Box and Muller (1958).

    Args:
        starts: (N,) int64, the bits of `streams`.
        count: numbers a stream, even.

    Returns:
        (N, count) float32.
    """
    steps = torch.arange(1, count // 2 + 1, dtype=torch.int64, device=starts.device)
    # the same arithmetic as above: int64 wraps around in torch
    bits = starts[:, None] + steps * _signed(_GOLDEN)
    for shift, factor in ((_SHIFT_1, _MIX_1), (_SHIFT_2, _MIX_2)):
        bits = (bits ^ _shifted(bits, shift)) * _signed(factor)
    bits = bits ^ _shifted(bits, _SHIFT_3)
    # 24 bits each, all that float32 holds; the first is never 0, whose logarithm is infinite
    first = ((_shifted(bits, 40) + 1).float()) * 2.0**-24
    second = (bits & 0xFFFFFF).float() * (2.0**-24 * 2.0 * torch.pi)
    radius = torch.sqrt(-2.0 * torch.log(first))
    return torch.cat([radius * torch.cos(second), radius * torch.sin(second)], dim=1)


def _mix(bits: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        bits = (bits ^ (bits >> np.uint64(_SHIFT_1))) * np.uint64(_MIX_1)
        bits = (bits ^ (bits >> np.uint64(_SHIFT_2))) * np.uint64(_MIX_2)
        return bits ^ (bits >> np.uint64(_SHIFT_3))


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _shifted(bits: torch.Tensor, by: int) -> torch.Tensor:
    """A logical shift to the right; torch's fills in the sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)
