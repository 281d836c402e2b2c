"""The loss, the optimizer, the learning rate of a step, and the average of the weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from fer_ray.config.registries import LR_SCHEDULES
from fer_ray.config.schema import OptimizerConfig, ScheduleConfig
from fer_ray.errors import unknown
from fer_ray.transforms.mixing import Mix


def class_weights(
    counts: Sequence[int] | np.ndarray, config: OptimizerConfig
) -> torch.Tensor | None:
    """The weight of each class in the loss.

    Args:
        counts: images of each class in the train split.
        config: which weighting; ``capped`` is the inverse frequency with no weight above
            ``class_weight_cap``.

    Returns:
        (classes,) float32 whose mean over the train images is 1, 0 for a class without images;
        None where all classes have the same weight.
    """
    if config.class_weights == "none":
        return None
    frequency = np.asarray(counts, dtype=np.float64)
    weights = np.divide(1.0, frequency, out=np.zeros_like(frequency), where=frequency > 0)
    weights *= frequency.sum() / (weights * frequency).sum()
    if config.class_weights == "capped":
        weights = _cap(weights, frequency, config.class_weight_cap)
    return torch.tensor(weights, dtype=torch.float32)


def _cap(weights: np.ndarray, frequency: np.ndarray, cap: float) -> np.ndarray:
    """Weights of at most `cap` with the same mean over the images.

    What is taken from a capped class is given to the others in proportion, which may lift
    another one over the cap: at most as many rounds as there are classes.
    """
    for _ in range(len(weights)):
        over = weights >= cap
        rest = (weights * frequency)[~over].sum()
        if not rest:
            break
        left = frequency.sum() - cap * frequency[over].sum()
        weights = np.where(over, cap, weights * left / rest)
    return weights


def summed_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    label_smoothing: float,
    weights: torch.Tensor | None,
    mix: Mix | None = None,
) -> torch.Tensor:
    """The cross-entropy of a batch, added up over its images.

    It is a sum and not a mean: workers divide by the size of the global batch, so that each
    image has the same weight in shards of different sizes.

    Args:
        logits: (N, classes).
        targets: (M,) classes of the batch's images; M is N where nothing is mixed.
        label_smoothing: fraction of the target that is spread evenly over all classes.
        weights: (classes,) or None.
        mix: how the images were mixed, and so the targets.
    """

    def summed(targets: torch.Tensor, reduction: str) -> torch.Tensor:
        return F.cross_entropy(
            logits, targets, weight=weights, label_smoothing=label_smoothing, reduction=reduction
        )

    if mix is None:
        return summed(targets, "sum")
    own, other = summed(targets[: len(logits)], "none"), summed(targets[mix.partner], "none")
    return torch.lerp(other, own, mix.own_fraction).sum()


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer of a model's parameters, with weight decay on matrices and kernels only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    assert config.learning_rate is not None
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            groups,
            lr=config.learning_rate,
            momentum=config.momentum,
            nesterov=config.momentum > 0,
            fused=True,
        )
    if config.optimizer == "adamw":
        betas = (config.momentum, 0.999)
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)
    raise unknown("--optimizer", config.optimizer, ("sgd", "adamw"))


def learning_rate(
    step: int, *, steps_per_epoch: int, peak: float, schedule: ScheduleConfig
) -> float:
    """The learning rate of a step.

    Args:
        step: counted from 0 over the whole run.
        steps_per_epoch: steps of one epoch.
        peak: the highest learning rate.
        schedule: gives the epochs, the warm-up and the shape.
    """
    rate = LR_SCHEDULES[schedule.learning_rate_schedule]
    warmup_steps = schedule.warmup_epochs * steps_per_epoch
    return rate(step, schedule.epochs * steps_per_epoch, warmup_steps, peak)


class WeightAverage:
    """The exponential moving average of a model's weights and batch statistics."""

    def __init__(self, model: nn.Module, *, half_life: float) -> None:
        """Starts from the model's current weights.

        Args:
            model: the one that trains; its tensors are read at each update.
            half_life: steps after which a step's weights count half; 0 follows the model.
        """
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._decay = 0.5 ** (1 / half_life) if half_life else 0.0
        averages, values = self.model.state_dict(), model.state_dict()
        # the tensors themselves, listed once: walking through the layers takes as long as a step
        # of a small network on a GPU
        floating = [name for name, value in averages.items() if value.is_floating_point()]
        self._averages = [averages[name] for name in floating]
        self._values = [values[name] for name in floating]
        others = averages.keys() - set(floating)
        self._counters = [(averages[name], values[name]) for name in others]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Adds the model's weights after a step (from 0); early steps keep less of the average.

        The decay is at most (1 + step) / (10 + step), as in TensorFlow's
        ``ExponentialMovingAverage``, so that the initial random weights are soon forgotten.
        """
        keep = min(self._decay, (1 + step) / (10 + step)) if self._decay else 0.0
        torch._foreach_lerp_(self._averages, self._values, 1.0 - keep)
        for average, value in self._counters:
            average.copy_(value)
