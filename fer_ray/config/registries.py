"""The choices that modules add themselves to, by the package that registers the project's own.

They stand here and not beside what they hold, so that a configuration can be checked, and a flag
offered, for whatever is registered, without knowing any of it.
"""

from __future__ import annotations

from typing import Any

from fer_ray.registry import Registry

MODELS: Registry[Any] = Registry("--model", "fer_ray.models.networks", order=lambda name, _: name)
"""Networks: subclasses of `fer_ray.config.schema.ModelConfig`."""

AUGMENTATIONS: Registry[Any] = Registry(
    "--augmentation", "fer_ray.transforms.augmentations", order=lambda _, entry: entry.position
)
"""Random changes of images: `fer_ray.transforms.operation.Augmentation`, in the order in which
they are made."""

NORMALIZATIONS: Registry[Any] = Registry("--normalization", "fer_ray.transforms.normalization")
"""From bytes to the network's input: `fer_ray.transforms.normalization.Normalization`."""

LR_SCHEDULES: Registry[Any] = Registry("--lr-schedule", "fer_ray.training.lr_schedules")
"""Learning-rate schedules: functions as `fer_ray.training.lr_schedules.cosine`."""
