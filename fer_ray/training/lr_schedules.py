"""Learning-rate schedules: a function of the step, from 0 to the peak learning rate.

A schedule takes the step (from 0), the steps of the whole run, those of the warm-up and the peak
learning rate, and returns the step's learning rate, from 0 to the peak. Another one is registered
here or in a plugin, and is a value of ``--lr-schedule``.
"""

from __future__ import annotations

import math

from fer_ray.config.registries import LR_SCHEDULES

ONE_CYCLE_WARMUP = 0.3
"""Fraction of the steps over which `one_cycle` rises, as in torch's `OneCycleLR`."""
ONE_CYCLE_START = 1 / 25
"""Where `one_cycle` starts, as a fraction of the peak, as in torch."""
STEPS = ((0.5, 0.1), (0.75, 0.01))
"""Fractions of the steps after which `step` has which factor (He et al. 2015, arXiv:1512.03385)."""


def warmup(step: int, warmup_steps: float, peak: float) -> float | None:
    """The learning rate of a linear warm-up; None after it."""
    return peak * (step + 1) / (warmup_steps + 1) if step < warmup_steps else None


@LR_SCHEDULES.register("cosine")
def cosine(step: int, total_steps: int, warmup_steps: float, peak: float) -> float:
    """A linear warm-up, then a cosine that reaches 0 after the last step."""
    rising = warmup(step, warmup_steps, peak)
    if rising is not None:
        return rising
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return peak * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


@LR_SCHEDULES.register("one-cycle")
def one_cycle(step: int, total_steps: int, warmup_steps: float, peak: float) -> float:
    """A cosine up over three tenths of the steps or the warm-up, whichever is longer, then one
    down to 0 (Smith and Topin 2017, arXiv:1708.07120)."""
    rise = max(ONE_CYCLE_WARMUP * total_steps, warmup_steps)
    if step < rise:
        rising = (1 - math.cos(math.pi * step / rise)) / 2
        return peak * (ONE_CYCLE_START + (1 - ONE_CYCLE_START) * rising)
    progress = (step - rise) / max(total_steps - rise, 1)
    return peak * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


@LR_SCHEDULES.register("step")
def step_down(step: int, total_steps: int, warmup_steps: float, peak: float) -> float:
    """A linear warm-up, then the peak, a tenth of it after half of the steps and a hundredth
    after three quarters."""
    rising = warmup(step, warmup_steps, peak)
    if rising is not None:
        return rising
    factors = [factor for fraction, factor in STEPS if step >= fraction * total_steps]
    return peak * factors[-1] if factors else peak


@LR_SCHEDULES.register("constant")
def constant(step: int, total_steps: int, warmup_steps: float, peak: float) -> float:
    """A linear warm-up, then the peak."""
    rising = warmup(step, warmup_steps, peak)
    return peak if rising is None else rising
