"""The flags of the training configuration: one for each setting, with its help and range."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from fer_ray.config import overrides
from fer_ray.config.fields import Setting
from fer_ray.config.registries import MODELS
from fer_ray.config.schema import SECTIONS, TrainConfig


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for every setting of the training configuration.

    A flag that is not given is None: which default a setting has may depend on others.
    """
    for title in SECTIONS:
        group = parser.add_argument_group(title)
        for setting in _settings_of(title):
            extra: dict[str, Any] = {"help": help_of(setting).replace("%", "%%")}
            if setting.type is bool:
                extra["action"] = argparse.BooleanOptionalAction
            elif setting.allowed is not None:
                extra["metavar"] = "|".join(setting.allowed)
            else:
                extra["type"] = setting.type
                extra["metavar"] = setting.type.__name__.upper()
            group.add_argument(setting.flag, dest=setting.name, default=None, **extra)


def _settings_of(section: str) -> list[Setting]:
    if section == "scaling":
        return list(SECTIONS[section].settings())
    return [setting for setting in overrides.settings().values() if setting.section == section]


def help_of(setting: Setting) -> str:
    """What a setting does, for which networks, its range and its default."""
    facts = [setting.bounds] if setting.bounds else []
    if setting.owners:
        defaults = {}
        for model in setting.owners:
            own = {other.field: other for other in MODELS[model].settings()}
            defaults[model] = own[setting.field].default
        known = {default for default in defaults.values() if default not in (None, "")}
        if len(known) == 1:
            facts.append(f"default: {known.pop()}")
        elif known:
            facts.append(f"default: {', '.join(f'{d} for {m}' for m, d in defaults.items())}")
    elif setting.default not in (None, ""):
        facts.append(f"default: {_shown(setting.default)}")
    text = f"{', '.join(setting.owners)}: {setting.doc}" if setting.owners else setting.doc
    return f"{text} ({'; '.join(facts)})" if facts else text


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return f"{default:g}" if isinstance(default, float) else str(default)


def config_from_flags(
    arguments: argparse.Namespace, *, data: str, base: Mapping[str, Any] | None = None
) -> TrainConfig:
    """The training configuration that `add_config_flags`'s flags describe.

    Args:
        arguments: the parsed flags.
        data: prepared data set: local path or URI.
        base: settings by dotted name that hold where no flag is given, such as those of a
            sweep's winner. Another ``--augmentation`` or ``--optimizer`` than theirs brings its
            own magnitudes or learning rate.

    Raises:
        UserError: for a value that is not allowed.
    """
    given = {
        name: value
        for name, value in vars(arguments).items()
        if value is not None and name.split(".")[0] in SECTIONS and "." in name
    }
    if base is None:
        return TrainConfig.from_dict({"data": data, **_nested(given)})
    known = {name: value for name, value in base.items() if value is not None}
    config = TrainConfig.from_dict({"data": data, **_nested(known)})
    scaling = {name: value for name, value in given.items() if name.startswith("scaling.")}
    rest = {name: value for name, value in given.items() if name not in scaling}
    values = overrides.changed(config, rest, keep_own=False).to_dict()
    return TrainConfig.from_dict({**values, **_nested(scaling)})


def _nested(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By section and field, of settings by dotted name."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        section, field = name.split(".")
        sections.setdefault(section, {})[field] = value
    return sections
