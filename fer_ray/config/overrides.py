"""The settings of a training run as a flat list: what a sweep varies, tables show, flags name.

A setting has a dotted name such as ``optimizer.learning_rate``, a column such as
``learning_rate`` and a flag such as ``--learning-rate``.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import shlex
from collections.abc import Mapping
from typing import Any

from fer_ray.config.fields import Setting
from fer_ray.config.registries import AUGMENTATIONS, LR_SCHEDULES, MODELS, NORMALIZATIONS
from fer_ray.config.schema import RESULT_SECTIONS, SECTIONS, TrainConfig
from fer_ray.errors import UserError


def settings() -> dict[str, Setting]:
    """Every setting that decides a run's result, by dotted name, in the order of the flags.

    The options of all registered networks are among them; `Setting.owners` says whose they are.
    """
    registries = (MODELS, AUGMENTATIONS, NORMALIZATIONS, LR_SCHEDULES)
    return _settings(tuple(registry.names for registry in registries))


@functools.lru_cache(maxsize=8)
def _settings(registered: tuple[tuple[str, ...], ...]) -> dict[str, Setting]:
    """`registered` is what the result depends on: names may be registered at any time."""
    settings_by_name = {setting.name: setting for setting in SECTIONS["model"].settings()}
    for model in MODELS:
        for setting in MODELS[model].settings():
            if setting.name not in settings_by_name:
                settings_by_name[setting.name] = dataclasses.replace(setting, owners=(model,))
            elif owners := settings_by_name[setting.name].owners:
                shared = settings_by_name[setting.name]
                settings_by_name[setting.name] = dataclasses.replace(
                    shared, owners=(*owners, model)
                )
    for section in RESULT_SECTIONS[1:]:
        settings_by_name |= {setting.name: setting for setting in SECTIONS[section].settings()}
    assert len({setting.column for setting in settings_by_name.values()}) == len(settings_by_name)
    return settings_by_name


def column_of(name: str) -> str:
    """The column of a dotted name: its flag without dashes at the front, underscores within."""
    return settings()[name].column


def columns() -> dict[str, str]:
    """The dotted name of every column."""
    return {setting.column: name for name, setting in settings().items()}


def values_of(config: TrainConfig) -> dict[str, Any]:
    """Every setting's value, by column; None for options of other networks."""
    values = config.to_dict()
    return {
        setting.column: values[setting.section].get(setting.field)
        for setting in settings().values()
    }


def check_name(where: str, name: str) -> str:
    """Returns the dotted name if it is one; a column's name is not.

    Raises:
        UserError: with the nearest right name.
    """
    if name in settings():
        return name
    # whoever forgets or mistakes the section means the setting
    last = name.rsplit(".", 1)[-1]
    by_word = {**columns(), **{other.split(".")[1]: other for other in settings()}}
    near = difflib.get_close_matches(last, by_word, n=1)
    hint = (
        f": did you mean {by_word[near[0]]!r}?" if near else f"; they are {', '.join(settings())}"
    )
    raise UserError(f"{where}: {name!r} is not a setting{hint}")


def check_value(where: str, name: str, value: Any) -> Any:
    """Returns a value that its setting allows.

    Raises:
        UserError: with what is allowed and the nearest allowed value.
    """
    if value is None:  # stands for a flag that is not given: its value depends on others
        raise UserError(f"{where}: {name}: null is not a value")
    if reason := settings()[name].refusal(value):
        raise UserError(f"{where}: {name}: {reason}")
    return value


def changed(
    config: TrainConfig, options: Mapping[str, Any], *, keep_own: bool = True
) -> TrainConfig:
    """The configuration with some settings changed.

    What follows from other settings follows anew: another augmentation preset brings its own
    magnitudes and another optimizer its own learning rate, except for those among the options,
    and those in which the configuration differs from its own preset and optimizer: whoever set
    them wants them in every trial.

    Args:
        config: all settings.
        options: values by dotted name.
        keep_own: whether what differs from the own preset is kept under another one.

    Raises:
        UserError: for an unknown name, or a value that is not allowed.
    """
    values: dict[str, Any] = config.to_dict()
    for section in RESULT_SECTIONS:
        derived = getattr(config, section).derived()
        own = [field for field in derived if values[section][field] != derived[field]]
        for field in derived.keys() - set(own):
            del values[section][field]
        if own and not keep_own:
            decisive = values[section].keys() - derived.keys()
            if any(
                options.get(f"{section}.{field}", values[section][field]) != values[section][field]
                for field in decisive & _deciding(section)
            ):
                for field in own:
                    del values[section][field]
    if options.get("model.name", config.model.name) != config.model.name:
        values["model"] = {"input_size": config.model.input_size}
    for name, value in options.items():
        section, field = check_name("options", name).split(".")
        values[section][field] = value
    return TrainConfig.from_dict(values)


def _deciding(section: str) -> set[str]:
    """Fields from which others of the section follow."""
    return {
        "transforms": {"augmentation"},
        "optimizer": {"optimizer"},
        "schedule": {"global_batch_size"},
    }.get(section, set())


def own_magnitudes(config: TrainConfig) -> dict[str, float]:
    """The magnitudes of augmentation that are not those of the preset, by dotted name."""
    preset = config.transforms.derived()
    return {
        f"transforms.{name}": value
        for name, value in config.transforms.magnitudes.items()
        if value != preset[name]
    }


def as_flags(config: TrainConfig) -> list[str]:
    """The flags of `jobs/train.py` that give these settings: those that differ from its defaults.

    Where the run works (workers, GPUs) is left to whoever runs it.
    """
    flags = []
    for section in RESULT_SECTIONS:
        part = getattr(config, section)
        values = part.to_dict()
        defaults = {setting.field: setting.default for setting in part.settings()}
        defaults |= part.derived()
        for setting in part.settings():
            value = values[setting.field]
            if value == defaults[setting.field]:
                continue
            if setting.type is bool:
                flags.append(setting.flag if value else f"--no-{setting.flag[2:]}")
            else:
                flags += [setting.flag, value if isinstance(value, str) else repr(value)]
    return flags


def as_command(config: TrainConfig, *, run: str) -> str:
    """The whole command line that trains one run with these settings, to paste into a shell."""
    flags = as_flags(config)
    words = [".venv/bin/python", "jobs/train.py", "--data", config.data, "--run", run, *flags]
    return shlex.join(words)
