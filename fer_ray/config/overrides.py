"""The settings of a training run as a flat list: what a sweep varies, tables show, flags name.

A setting has a dotted name such as ``optimizer.learning_rate``, a column such as
``learning_rate`` and a flag such as ``--learning-rate``.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import shlex
from collections.abc import Mapping
from typing import Any

from fer_ray.config.schema import (
    DEFAULT_LEARNING_RATE,
    MAGNITUDES,
    PRESETS,
    SECTIONS,
    TrainConfig,
    check_field,
    flag_of,
)
from fer_ray.errors import UserError, unknown

_RESULT_SECTIONS = ("model", "transforms", "optimizer", "schedule")

FIELDS: dict[str, dataclasses.Field] = {
    f"{section}.{spec.name}": spec
    for section in _RESULT_SECTIONS
    for spec in dataclasses.fields(SECTIONS[section])
}
"""Every setting that decides a run's result, by its dotted name, in the order of the flags."""


def column_of(name: str) -> str:
    """The column of a dotted name: its flag without dashes at the front, underscores within."""
    return flag_of(FIELDS[name])[2:].replace("-", "_")


COLUMNS: dict[str, str] = {column_of(name): name for name in FIELDS}
"""The dotted name of every column."""
assert len(COLUMNS) == len(FIELDS)


def values_of(config: TrainConfig) -> dict[str, Any]:
    """Every setting's value, by column."""
    values = config.to_dict()
    found = {}
    for column, name in COLUMNS.items():
        section, field = name.split(".")
        found[column] = values[section][field]
    return found


def check_name(where: str, name: str) -> str:
    """Returns the dotted name if it is one; a column's name is not.

    Raises:
        UserError: with the nearest right name.
    """
    if name in FIELDS:
        return name
    # whoever forgets or mistakes the section means the setting
    last = name.rsplit(".", 1)[-1]
    by_word = {**COLUMNS, **{other.split(".")[1]: other for other in FIELDS}}
    near = difflib.get_close_matches(last, by_word, n=1)
    hint = f": did you mean {by_word[near[0]]!r}?" if near else f"; they are {', '.join(FIELDS)}"
    raise UserError(f"{where}: {name!r} is not a setting{hint}")


def check_value(where: str, name: str, value: Any) -> Any:
    """Returns a value that its setting allows.

    Raises:
        UserError: with what is allowed and the nearest allowed value.
    """
    spec = FIELDS[name]
    if value is None:  # would be a flag that is not given: its value depends on others
        raise UserError(f"{where}: {name}: null is not a value")
    if isinstance(spec.default, bool) and not isinstance(value, bool):
        raise UserError(f"{where}: {name}: {value!r} is not true or false")
    if str(spec.type) == "str" and not isinstance(value, str):
        raise unknown(f"{where}: {name}", value, spec.metadata.get("allowed") or ["text"])
    try:
        check_field(spec, value)
    except UserError as error:
        reason = str(error).removeprefix(f"{flag_of(spec)}: ")
        raise UserError(f"{where}: {name}: {reason}{_nearest(spec, value)}") from error
    return value


def _nearest(spec: dataclasses.Field, value: Any) -> str:
    if "low" not in spec.metadata or isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    low, high = spec.metadata["low"], spec.metadata["high"]
    near = max(min(value, math.inf if high is None else high), low)
    if "float" not in str(spec.type):
        near = round(near)
    return f"; the nearest allowed is {near:g}"


def changed(config: TrainConfig, options: Mapping[str, Any]) -> TrainConfig:
    """The configuration with some settings changed.

    Another augmentation preset brings its own strengths, and another optimizer its own default
    rate, but for those that are among the options too, and those in which the configuration
    differs from its own preset and optimizer: whoever set them wants them in every trial.

    Args:
        config: all settings.
        options: values by dotted name.

    Raises:
        UserError: for an unknown name, or a value that is not allowed.
    """
    values = config.to_dict()
    if "transforms.augmentation" in options:
        kept = own_magnitudes(config)
        values["transforms"] |= {
            magnitude: None for magnitude in MAGNITUDES if f"transforms.{magnitude}" not in kept
        }
    usual = _default(config, "optimizer.learning_rate", FIELDS["optimizer.learning_rate"])
    if "optimizer.optimizer" in options and config.optimizer.learning_rate == usual:
        values["optimizer"]["learning_rate"] = None
    for name, value in options.items():
        section, field = check_name("options", name).split(".")
        values[section][field] = value
    return TrainConfig.from_dict(values)


def own_magnitudes(config: TrainConfig) -> dict[str, float]:
    """The strengths of augmentation that are not those of the preset, by dotted name."""
    found = {f"transforms.{name}": getattr(config.transforms, name) for name in MAGNITUDES}
    return {
        name: value
        for name, value in found.items()
        if value != _default(config, name, FIELDS[name])
    }


def as_flags(config: TrainConfig) -> list[str]:
    """The flags of `jobs/train.py` that give these settings: those that differ from its defaults.

    Where the run works (workers, GPUs) is left to whoever runs it.
    """
    flags = []
    for name, spec in FIELDS.items():
        section, field = name.split(".")
        value = getattr(getattr(config, section), field)
        if value == _default(config, name, spec):
            continue
        if isinstance(value, bool):
            flags.append(flag_of(spec) if value else flag_of(spec).replace("--", "--no-", 1))
        else:
            text = value if isinstance(value, str) else repr(value)
            flags += [flag_of(spec), text]
    return flags


def _default(config: TrainConfig, name: str, spec: dataclasses.Field) -> Any:
    """What a setting is when its flag is not given but the others are."""
    if name == "optimizer.learning_rate":
        return DEFAULT_LEARNING_RATE[config.optimizer.optimizer]
    if spec.name in MAGNITUDES and name.startswith("transforms."):
        return PRESETS[config.transforms.augmentation].get(spec.name, 0.0)
    return spec.default


def as_command(config: TrainConfig, *, run: str) -> str:
    """The whole command line that trains one run with these settings, to paste into a shell."""
    flags = as_flags(config)
    words = [".venv/bin/python", "jobs/train.py", "--data", config.data, "--run", run, *flags]
    return shlex.join(words)
