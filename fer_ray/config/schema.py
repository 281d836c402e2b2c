"""Every setting of a training run: names, defaults, ranges.

Functions take the section that they need. A configuration crosses to workers and into
checkpoints as a plain dict (`TrainConfig.to_dict`, `from_dict`), where unknown keys are refused.
The string under each field is its documentation and the help of its flag.

What a model is built with, the magnitudes of augmentations, normalizations and learning-rate
schedules are not listed here: they come from `fer_ray.config.registries`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fer_ray.config.fields import Search, Section, choice, number
from fer_ray.config.model import ModelConfig, model_config
from fer_ray.config.registries import LR_SCHEDULES
from fer_ray.config.transforms import TransformConfig
from fer_ray.errors import UserError, unknown

LOADINGS = ("auto", "memory", "stream")
OPTIMIZERS = ("sgd", "adamw")
CLASS_WEIGHTS = ("none", "balanced", "capped")
PRECISIONS = ("auto", "float32", "tf32", "bfloat16")
COMPILE = ("auto", "on", "off")
GRADIENT_EXCHANGES = ("float32", "bfloat16")
DEFAULT_LEARNING_RATE = {"sgd": 0.1, "adamw": 0.001}

_LARGEST_BATCH = 1_000_000
_MOST_IN_GROUP = 32
"""16 to 64 images in a group suit small data sets (Summers and Dinneen 2020, arXiv:1906.03548)."""
_LEAST_IN_GROUP = 8
"""Statistics of fewer images are too noisy for a default."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """How the weights are updated."""

    section: ClassVar[str] = "optimizer"

    optimizer: str = choice("sgd", OPTIMIZERS)
    """`sgd` with Nesterov momentum, or `adamw`."""
    learning_rate: float | None = number(
        None, 1e-8, 100, search=Search(factors=(0.1, 3.0), log=True)
    )
    """Peak learning rate, for the global batch; by default 0.1 for sgd, 0.001 for adamw."""
    momentum: float = number(0.9, 0, 0.999)
    """Momentum of sgd; the first beta of adamw."""
    weight_decay: float = number(5e-4, 0, 1, search=Search(low=1e-5, high=1e-2, log=True))
    """Decay of weight matrices and kernels; biases and batch-norm parameters have none."""
    label_smoothing: float = number(0.1, 0, 0.9, search=Search(low=0.0, high=0.2))
    """Fraction of the target that is spread evenly over all classes."""
    class_weights: str = choice("none", CLASS_WEIGHTS)
    """`balanced`: inverse class frequency; `capped`: the same, but at most `class_weight_cap`;
    the mean weight over the train images is 1."""
    class_weight_cap: float = number(3.0, 1, 1000)
    """Largest weight of `capped`, as a multiple of the mean."""
    ema_half_life: float = number(1.5, 0, 1000)
    """Epochs after which a step's weights count half in the exponential moving average, which is
    evaluated and kept; 0: no average."""
    clip_grad_norm: float = number(5.0, 0, 1e6)
    """Largest norm of the gradient; 0: no clipping."""

    def derived(self) -> dict[str, Any]:
        """The optimizer's default learning rate."""
        return {"learning_rate": DEFAULT_LEARNING_RATE.get(self.optimizer)}


def divisors(number: int) -> list[int]:
    """The divisors of a positive number, in order."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def default_group(batch: int) -> int:
    """The default of `ScheduleConfig.batch_norm_group` for a global batch."""
    up_to = max(n for n in divisors(batch) if n <= _MOST_IN_GROUP)
    if up_to >= min(batch, _LEAST_IN_GROUP):
        return up_to
    return min(n for n in divisors(batch) if n > _MOST_IN_GROUP)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Section):
    """How long training takes, at which learning rate, in which batches, and when it stops."""

    section: ClassVar[str] = "schedule"

    epochs: int = number(30, 1, 100_000)
    """Passes over the train split; the learning-rate schedule ends with the last."""
    learning_rate_schedule: str = choice("cosine", LR_SCHEDULES, flag="lr-schedule")
    """Learning rate after the warm-up: `cosine` to 0, `step` (a tenth after half and after three
    quarters of the epochs), `constant`, or `one-cycle`, which has a warm-up of its own over the
    first three tenths, if longer."""
    warmup_epochs: float = number(1.0, 0, 1000)
    """Epochs over which the learning rate rises linearly from 0 to its peak."""
    global_batch_size: int = number(128, 1, _LARGEST_BATCH)
    """Images per step over all workers together."""
    batch_norm_group: int | None = number(None, 1, 1_000_000)
    """Images in a group of batch norm: consecutive ones of the global batch, which it divides
    (ghost batch norm); by default the largest divisor of the global batch up to 32, or if that is
    below 8, the smallest above 32."""
    patience: int = number(0, 0, 100_000)
    """Stop after this many epochs without a better validation accuracy; 0: never."""
    time_limit_s: float = number(0.0, 0, 1e9)
    """Stop after the epoch in which the run's training time exceeds this many seconds; 0: no
    limit."""
    seed: int = number(0, 0, 2**31 - 1)
    """Decides the initial weights, the order of the images and their augmentation."""
    precision: str = choice("auto", PRECISIONS)
    """Arithmetic of forward and backward passes: `float32`, `tf32` (GPUs only: its products have
    10 bits), `bfloat16`, or `auto`: bfloat16 where the device is faster with it, else float32."""
    compile: str = choice("auto", COMPILE)
    """Compile the network that trains (`torch.compile`): `on`, `off`, or `auto`: efficientnet_b2 on
    CPUs with a C++ compiler, where training takes two hours of one core or more. Changes the
    rounding."""
    flip_at_test: bool = True
    """Test-time augmentation: average the probabilities of each image and its mirror image."""
    loading: str = choice("auto", LOADINGS)
    """`memory`: workers hold the whole split; `stream`: Ray Data reads it again in each epoch;
    `auto`: memory if the images fit into three tenths of each node's object store."""
    shuffle_buffer: int = number(4096, 1, 100_000_000)
    """stream: minimum size of each worker's shuffle buffer, in images."""

    def derived(self) -> dict[str, Any]:
        """The default group of batch norm."""
        batch = self.global_batch_size
        # what is not allowed is refused afterwards
        is_allowed = isinstance(batch, int) and 0 < batch <= _LARGEST_BATCH
        return {"batch_norm_group": default_group(batch) if is_allowed else 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_epochs > self.epochs:
            raise UserError(
                f"--warmup-epochs: {self.warmup_epochs:g} is more than --epochs {self.epochs}"
            )
        batch, group = self.global_batch_size, self.batch_norm_group
        assert group is not None
        if batch % group:
            nearest = min(divisors(batch), key=lambda divisor: abs(divisor - group))
            raise UserError(
                f"--batch-norm-group: {group} does not divide --global-batch-size {batch}; "
                f"{nearest} does"
            )


@dataclass(frozen=True, kw_only=True)
class ScalingConfig(Section):
    """Where the work runs; it does not change what is computed, except for rounding."""

    section: ClassVar[str] = "scaling"

    num_workers: int = number(2, 1, 10_000)
    """Data-parallel worker processes."""
    cpus_per_worker: float = number(1.0, 0.01, 10_000)
    """CPUs that Ray reserves for each worker; may be a fraction."""
    threads_per_worker: int = number(0, 0, 10_000)
    """CPU threads of each worker; 0: its CPUs, rounded down, at least 1."""
    use_gpu: bool = False
    """Give each worker a GPU."""
    gradient_exchange: str = choice("float32", GRADIENT_EXCHANGES)
    """How workers send each other their gradients: `bfloat16` halves the bytes, for slow networks,
    and rounds to 8 bits."""
    max_failures: int = number(3, 0, 1_000)
    """Maximum number of worker failures to recover from; each restarts from the last
    checkpoint."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run, resolved: everything that decides its result, and where it runs."""

    data: str
    """Prepared data set: local path or URI."""
    model: ModelConfig = field(default_factory=model_config)
    transforms: TransformConfig = field(default_factory=TransformConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)

    def __post_init__(self) -> None:
        schedule, workers = self.schedule, self.scaling.num_workers
        batch, group = schedule.global_batch_size, schedule.batch_norm_group
        assert group is not None
        if batch < workers:
            raise UserError(
                f"--global-batch-size: {batch} images cannot be shared by {workers} workers; "
                "give at least one image per worker"
            )
        if not self.model.has_batch_norm and group != schedule.derived()["batch_norm_group"]:
            raise UserError(f"--batch-norm-group: --model {self.model.name} has no batch norm")
        if batch // self.images_per_unit < workers:
            smaller = max(divisor for divisor in divisors(batch) if divisor * workers <= batch)
            raise UserError(
                f"--num-workers: {workers} workers, but a batch of {batch} images has only "
                f"{batch // group} group(s) of {group} for batch norm: give --batch-norm-group "
                f"{smaller}, or --global-batch-size {group * workers} --batch-norm-group {group}"
            )

    @property
    def images_per_unit(self) -> int:
        """Consecutive images of a global batch that one worker computes together.

        The group of batch norm; 1 for networks without it.
        """
        assert self.schedule.batch_norm_group is not None
        return self.schedule.batch_norm_group if self.model.has_batch_norm else 1

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts of JSON types: ``data``, and a dict for each section."""
        sections = {name: getattr(self, name).to_dict() for name in SECTIONS}
        return {"data": self.data, **sections}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`; absent values are defaults.

        Raises:
            UserError: for unknown keys and values that are not allowed.
        """
        for key in values:
            if key not in ("data", *SECTIONS):
                raise unknown("configuration", key, ("data", *SECTIONS))
            if key != "data" and not isinstance(values[key], Mapping):
                raise UserError(f"configuration: {key} is not a section but {values[key]!r}")
        if not isinstance(values.get("data"), str):
            raise UserError("configuration: data is not a path")
        sections: dict[str, Any] = {
            name: section.from_dict(values.get(name, {}))
            for name, section in SECTIONS.items()
            if name != "model"
        }
        model = model_config(**values.get("model", {}))
        return cls(data=values["data"], model=model, **sections)


SECTIONS: dict[str, type[Section]] = {
    "model": ModelConfig,
    "transforms": TransformConfig,
    "optimizer": OptimizerConfig,
    "schedule": ScheduleConfig,
    "scaling": ScalingConfig,
}
"""The sections of `TrainConfig`, by field name."""

RESULT_SECTIONS = ("model", "transforms", "optimizer", "schedule")
"""The sections that decide a run's result."""


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What two configurations (`to_dict`) disagree on, except for where the work runs.

    Returns:
        One ``section.name: old -> new`` an entry, in the order of the fields.
    """
    lines = []
    for section in RESULT_SECTIONS:
        before, after = old.get(section, {}), new.get(section, {})
        lines += [
            f"{section}.{name}: {before.get(name)!r} -> {after.get(name)!r}"
            for name in dict.fromkeys([*before, *after])
            if before.get(name) != after.get(name)
        ]
    return lines
