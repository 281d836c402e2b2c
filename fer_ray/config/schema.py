"""Every setting of a training run: names, defaults, ranges.

Frozen dataclasses, one a concern; functions take the section that they need. A configuration
crosses to workers and into checkpoints as a plain dict (`to_dict`, `from_dict`), where unknown
keys are refused. The string under each field is its documentation and the help of its flag.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fer_ray.errors import UserError, unknown

MODELS = ("custom_cnn", "efficientnet_b2", "sequential_cnn")
SETTINGS = ("small", "full")
HEADS = ("linear", "hidden")
NORMALIZATIONS = (
    *("none", "minmax", "standardize", "dataset"),
    *("equalize", "clahe", "equalize+dataset", "clahe+dataset"),
)
ENGINES = ("auto", "albumentations", "device")
LOADINGS = ("auto", "memory", "stream")
OPTIMIZERS = ("sgd", "adamw")
CLASS_WEIGHTS = ("none", "balanced", "capped")
PRECISIONS = ("auto", "float32", "bfloat16")
DEFAULT_LEARNING_RATE = {"sgd": 0.1, "adamw": 0.001}

PRESETS: dict[str, dict[str, float]] = {
    "none": {},
    # what the original notebook had
    "notebook": {"flip": 0.5, "rotation": 36.0, "translation": 0.1, "contrast": 0.1},
    "standard": {
        "flip": 0.5,
        "rotation": 10.0,
        "translation": 0.12,
        "zoom": 0.12,
        "erasing": 0.5,
    },
    "strong": {
        "flip": 0.5,
        "rotation": 15.0,
        "translation": 0.12,
        "crop": 0.35,
        "brightness": 0.2,
        "contrast": 0.3,
        "blur": 1.0,
        "noise": 0.05,
        "erasing": 0.5,
        "mixup": 0.2,
        "cutmix": 1.0,
    },
}
"""Named augmentations: the strengths that are not 0."""

AUGMENTATIONS = tuple(PRESETS)


def _choice(default: str, allowed: tuple[str, ...], flag: str | None = None) -> Any:
    return field(default=default, metadata={"allowed": allowed, "flag": flag})


def _number(default: Any, low: float, high: float | None = None) -> Any:
    return field(default=default, metadata={"low": low, "high": high})


def flag_of(spec: dataclasses.Field) -> str:
    """The flag of a field, such as ``--learning-rate``."""
    return "--" + (spec.metadata.get("flag") or spec.name.replace("_", "-"))


def check_field(spec: dataclasses.Field, value: Any) -> None:
    """Raises `UserError` where a value is not what its field allows."""
    allowed = spec.metadata.get("allowed")
    if allowed is not None:
        if value not in allowed:
            raise unknown(flag_of(spec), value, allowed)
        return
    if "low" not in spec.metadata or (value is None and spec.default is None):
        return
    low, high = spec.metadata["low"], spec.metadata["high"]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    whole = "float" in str(spec.type) or isinstance(value, int)
    if not (number and whole and low <= value and (high is None or value <= high)):
        bounds = f"at least {low:g}" if high is None else f"from {low:g} to {high:g}"
        raise UserError(f"{flag_of(spec)}: {value!r} is not {bounds}")


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the configuration whose fields check themselves."""

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            check_field(spec, getattr(self, spec.name))


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """Which network, and its size."""

    name: str = _choice("custom_cnn", MODELS, flag="model")
    """The network."""
    setting: str = _choice("small", SETTINGS, flag="model-setting")
    """custom_cnn: `small` trains on two CPU cores, `full` is for a GPU."""
    width: int = _number(0, 0, 512)
    """custom_cnn: channels of the first stage, doubled by each later one; 0: the setting's."""
    depth: int = _number(0, 0, 16)
    """custom_cnn: residual blocks a stage; 0: the setting's."""
    dropout: float | None = _number(None, 0, 0.95)
    """Dropout before the classifier, a probability; by default the model's own."""
    stochastic_depth: float | None = _number(None, 0, 0.95)
    """efficientnet_b2: how often its last block is left out in training, 0.2 by default."""
    head: str = _choice("linear", HEADS)
    """efficientnet_b2: `linear` as published, or `hidden`: a layer of 256 before it."""
    input_size: int = _number(0, 0, 1024)
    """Pixels a side of what the network sees; 0: the size of the prepared images."""
    weights: str = ""
    """efficientnet_b2: `imagenet` (downloads) or a file of torchvision's; empty: from scratch."""


@dataclass(frozen=True, kw_only=True)
class TransformConfig(Section):
    """What happens to the pixels. Strengths that are not given are the preset's.

    `dataclasses.replace` keeps the strengths: `with_preset` is for another preset.
    """

    normalization: str = _choice("dataset", NORMALIZATIONS)
    """`none` divides by 255; `minmax` spreads each image over 0 to 1; `standardize` gives each
    mean 0 and deviation 1, `dataset` the train split as a whole; `equalize` and `clahe` flatten
    each image's histogram, as a whole or in tiles."""
    augmentation: str = _choice("standard", AUGMENTATIONS)
    """Preset of the random changes below, which are made in that order."""
    engine: str = _choice("auto", ENGINES)
    """What augments: `albumentations`, image by image on CPUs, or `device`, whole batches where
    the model trains; `auto` is `device`."""
    flip: float | None = _number(None, 0, 1)
    """How often an image is mirrored, a probability."""
    rotation: float | None = _number(None, 0, 180)
    """Rotation by up to so many degrees, either way."""
    translation: float | None = _number(None, 0, 0.5)
    """Shift by up to this share of the side, either way, along and across."""
    zoom: float | None = _number(None, 0, 0.5)
    """Scale about the centre by up to this share, either way."""
    crop: float | None = _number(None, 0, 0.9)
    """Random resized crop: up to this share of the area is cut away."""
    brightness: float | None = _number(None, 0, 1)
    """Light added or taken away, up to this share of the range."""
    contrast: float | None = _number(None, 0, 1)
    """Contrast about the image's mean, scaled by up to this share, either way."""
    blur: float | None = _number(None, 0, 4)
    """Largest deviation of a Gaussian blur in pixels; half of the images."""
    noise: float | None = _number(None, 0, 0.5)
    """Largest deviation of Gaussian noise as a share of the range; half of the images."""
    erasing: float | None = _number(None, 0, 1)
    """How often a rectangle of a tenth to four tenths of each side turns grey, a probability."""
    mixup: float | None = _number(None, 0, 10)
    """Blend with another image of the batch: both parameters of the share's beta distribution."""
    cutmix: float | None = _number(None, 0, 10)
    """A rectangle from another image of the batch: as `mixup`; with both, half of each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        preset = PRESETS[self.augmentation]
        for name in MAGNITUDES:
            if getattr(self, name) is None:
                object.__setattr__(self, name, preset.get(name, 0.0))

    def with_preset(self, augmentation: str) -> TransformConfig:
        """The same with all strengths of another preset."""
        unset = dict.fromkeys(MAGNITUDES)
        return dataclasses.replace(self, augmentation=augmentation, **unset)  # type: ignore[arg-type]


MAGNITUDES = tuple(
    spec.name for spec in dataclasses.fields(TransformConfig) if "float" in str(spec.type)
)
"""The fields of `TransformConfig` that presets set."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """How the weights move."""

    optimizer: str = _choice("sgd", OPTIMIZERS)
    """`sgd` with Nesterov momentum, or `adamw`."""
    learning_rate: float | None = _number(None, 1e-8, 100)
    """Peak rate, for the global batch; by default 0.1 for sgd, 0.001 for adamw."""
    momentum: float = _number(0.9, 0, 0.999)
    """Momentum of sgd; the first beta of adamw."""
    weight_decay: float = _number(5e-4, 0, 1)
    """Decay of weight matrices and kernels; biases and batch-norm parameters have none."""
    warmup_epochs: float = _number(1.0, 0, 1000)
    """Epochs over which the rate rises linearly from 0; a cosine to 0 follows."""
    label_smoothing: float = _number(0.1, 0, 0.9)
    """Share of the target spread evenly over all classes."""
    class_weights: str = _choice("none", CLASS_WEIGHTS)
    """`balanced`: inverse frequency; `capped`: that, at most `class_weight_cap`; mean weight 1."""
    class_weight_cap: float = _number(3.0, 1, 1000)
    """The largest weight of `capped`, as a multiple of the mean."""
    ema_decay: float = _number(0.998, 0, 0.99999)
    """Decay a step of the average of the weights that is evaluated and kept; 0: no average."""
    clip_grad_norm: float = _number(5.0, 0, 1e6)
    """Largest norm of the gradient; 0: no clipping."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", DEFAULT_LEARNING_RATE[self.optimizer])


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Section):
    """How long, in what portions, and when to stop."""

    epochs: int = _number(30, 1, 100_000)
    """Passes over the train split; the cosine ends with the last."""
    global_batch_size: int = _number(128, 1, 1_000_000)
    """Images a step over all workers together."""
    patience: int = _number(0, 0, 100_000)
    """Stop after so many epochs without a better validation accuracy; 0: never."""
    time_limit_s: float = _number(0.0, 0, 1e9)
    """Stop after the epoch that passes so many seconds of this run's work; 0: no limit."""
    seed: int = _number(0, 0, 2**31 - 1)
    """Decides the initial weights, the order of the images and their augmentation."""
    precision: str = _choice("auto", PRECISIONS)
    """Of forward and backward; `auto`: bfloat16 where the device is faster with it."""
    flip_at_test: bool = True
    """Average the probabilities of each image and its mirror image."""
    loading: str = _choice("auto", LOADINGS)
    """`memory`: workers hold the whole split; `stream`: Ray Data reads it anew in each epoch;
    `auto`: memory where three tenths of each node's object store hold the images."""
    shuffle_buffer: int = _number(4096, 1, 100_000_000)
    """stream: at least so many images wait at each worker to be drawn at random."""


@dataclass(frozen=True, kw_only=True)
class ScalingConfig(Section):
    """Where the work runs; it does not change what is computed, but for rounding."""

    num_workers: int = _number(2, 1, 10_000)
    """Data-parallel worker processes."""
    cpus_per_worker: float = _number(1.0, 0.01, 10_000)
    """CPUs that Ray reserves for each worker; may be a fraction."""
    threads_per_worker: int = _number(0, 0, 10_000)
    """Threads of each worker on the CPU; 0: its CPUs, rounded down, at least 1."""
    use_gpu: bool = False
    """Give each worker a GPU."""
    max_failures: int = _number(3, 0, 1_000)
    """How often lost workers are replaced, each time from the last checkpoint."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """One training run, resolved: everything that decides its result, and where it runs."""

    data: str
    """Prepared data set: local path or URI."""
    model: ModelConfig = ModelConfig()
    transforms: TransformConfig = TransformConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    scaling: ScalingConfig = ScalingConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        batch, workers = self.schedule.global_batch_size, self.scaling.num_workers
        if batch < workers:
            raise UserError(
                f"--global-batch-size: {batch} images cannot be shared by {workers} workers; "
                "give at least one image a worker"
            )
        if self.optimizer.warmup_epochs > self.schedule.epochs:
            raise UserError(
                f"--warmup-epochs: {self.optimizer.warmup_epochs:g} is more than "
                f"--epochs {self.schedule.epochs}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dicts of JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`; unknown keys and impossible values raise `UserError`."""
        return _section_from_dict(cls, values)


SECTIONS: dict[str, type[Section]] = {
    "model": ModelConfig,
    "transforms": TransformConfig,
    "optimizer": OptimizerConfig,
    "schedule": ScheduleConfig,
    "scaling": ScalingConfig,
}
"""The sections of `TrainConfig`, by field name."""


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What two configurations (`to_dict`) disagree on, but for where the work runs.

    Returns:
        One ``section.name: old -> new`` an entry, in the order of the fields.
    """
    lines = []
    for section in ("model", "transforms", "optimizer", "schedule"):
        before, after = old.get(section, {}), new.get(section, {})
        lines += [
            f"{section}.{name}: {before.get(name)!r} -> {after.get(name)!r}"
            for name in dict.fromkeys([*before, *after])
            if before.get(name) != after.get(name)
        ]
    return lines


def _section_from_dict(cls: type, values: Mapping[str, Any]) -> Any:
    names = [spec.name for spec in dataclasses.fields(cls)]
    for key in values:
        if key not in names:
            raise unknown(f"{cls.__name__}", key, names)
    # only the root's keys are sections: `OptimizerConfig` has a field `optimizer` too
    built = {
        key: _section_from_dict(SECTIONS[key], value)
        if cls is TrainConfig and key in SECTIONS
        else value
        for key, value in values.items()
    }
    return cls(**built)
