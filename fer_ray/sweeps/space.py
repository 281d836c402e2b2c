"""What a sweep varies: presets, and spaces that are read from TOML or JSON files.

A grid trains every arm with every seed, and its first arm is the baseline; a search draws
configurations from lists and ranges.
"""

from __future__ import annotations

import itertools
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fer_ray.config import overrides
from fer_ray.config.fields import Setting
from fer_ray.config.registries import AUGMENTATIONS, NORMALIZATIONS
from fer_ray.config.schema import TrainConfig
from fer_ray.errors import UserError, unknown

GRID, SEARCH = "grid", "search"
METHODS = (GRID, SEARCH)
SWEEPS = ("normalization", "augmentation", "search")
"""The presets."""

_FIXED = {
    "schedule.epochs": "is the same for all trials: use --epochs",
    "schedule.seed": "is varied by --seeds",
    "schedule.time_limit_s": "is the same for all trials: use --time-limit-s",
    "schedule.loading": "cannot be varied: the trials of a sweep share the images in memory",
    "schedule.shuffle_buffer": "cannot be varied: the trials of a sweep do not stream",
}
"""Settings that no space may vary, and why."""
_MOST_ARMS = 10_000
_FIELDS_OF_A_RANGE = ("low", "high", "log", "step")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One configuration of a grid."""

    name: str
    """The settings that differ, such as ``normalization=minmax``."""
    options: dict[str, Any]
    """Values by dotted name."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers from `low` to `high`, both included."""

    low: float
    high: float
    log: bool = False
    """Whether to draw uniformly on a logarithmic scale."""
    step: float | None = None
    """Distance between the values; None: any, or 1 for whole numbers."""


Choices = tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Space:
    """What a sweep varies."""

    name: str
    """Name of the preset or the file."""
    method: str
    """`grid` or `search`."""
    arms: tuple[Arm, ...] = ()
    """The arms of a grid; the first is the baseline."""
    ranges: dict[str, Range | Choices] = field(default_factory=dict)
    """The ranges and choices of a search, by dotted name."""

    def to_dict(self) -> dict[str, Any]:
        """The space as JSON types: ``method``, and ``arms`` or ``space``."""
        if self.method == GRID:
            return {"method": GRID, "arms": [asdict(arm) for arm in self.arms]}
        ranges = {
            name: asdict(options) if isinstance(options, Range) else list(options)
            for name, options in self.ranges.items()
        }
        return {"method": SEARCH, "space": ranges}

    def configs(self, base: TrainConfig) -> list[TrainConfig]:
        """The settings of every arm; for a search, the base with each choice and bound.

        Raises:
            UserError: for settings that a trial could not have.
        """
        configs = [overrides.changed(base, arm.options) for arm in self.arms]
        for name, options in self.ranges.items():
            ends = (options.low, options.high) if isinstance(options, Range) else options
            configs += [overrides.changed(base, {name: value}) for value in ends]
        return configs

    def largest_model(self) -> dict[str, Any]:
        """For a search, the largest number of each setting of the network, by dotted name."""
        largest: dict[str, Any] = {}
        for name, options in self.ranges.items():
            if name.startswith("model.") and overrides.settings()[name].is_number:
                largest[name] = options.high if isinstance(options, Range) else max(options)
        return largest


def load(what: str, base: TrainConfig) -> Space:
    """Loads a preset or a file.

    Args:
        what: one of `SWEEPS`, or the path of a ``.toml`` or ``.json`` file.
        base: the settings that are varied.

    Raises:
        UserError: for an unknown preset, a missing file, or content that is not allowed.
    """
    if what == "normalization":
        space = _normalization(base)
    elif what == "augmentation":
        space = _augmentation(base)
    elif what == "search":
        space = _search(base)
    elif Path(what).suffix in (".toml", ".json"):
        space = _from_file(Path(what))
    else:
        raise unknown("--sweep", what, [*SWEEPS, "a .toml or .json file"])
    space.configs(base)  # refuses what no trial could have, before any data is read
    return space


def _normalization(base: TrainConfig) -> Space:
    """Every normalization; the baseline divides by 255 and does no more."""
    name = "transforms.normalization"
    ordered = sorted(NORMALIZATIONS, key=lambda normalization: normalization != "none")
    arms = tuple(
        Arm(name=f"normalization={normalization}", options={name: normalization})
        for normalization in ordered
    )
    return Space(name="normalization", method=GRID, arms=arms)


def _augmentation(base: TrainConfig) -> Space:
    """The base's augmentation, with each of its changes left out, each other one added, and
    without any."""
    preset = base.transforms.augmentation
    arms = [Arm(name=f"augmentation={preset}", options={})]
    for augmentation in AUGMENTATIONS.values():
        for option in augmentation.options:
            value = 0.0 if base.transforms.magnitudes[option.name] else option.usual
            options = {f"transforms.{option.name}": value}
            arms.append(Arm(name=f"{option.name}={value:g}", options=options))
    if preset != "none":
        # what the base has beyond its preset would stay
        own = [name for name, value in overrides.own_magnitudes(base).items() if value]
        nothing = {"transforms.augmentation": "none", **dict.fromkeys(own, 0.0)}
        arms.append(Arm(name="augmentation=none", options=nothing))
    return Space(name="augmentation", method=GRID, arms=tuple(arms))


def _search(base: TrainConfig) -> Space:
    """Normalization, and every setting of the base that says how it is searched: magnitudes
    from 0 to more than `strong` has, the optimizer, the size of the network."""
    values = base.to_dict()
    ranges: dict[str, Range | Choices] = {"transforms.normalization": NORMALIZATIONS.names}
    for section in ("transforms", "optimizer", "model"):
        for setting in getattr(base, section).settings():
            if setting.search:
                ranges[setting.name] = _searched(setting, values[section][setting.field])
    return Space(name="search", method=SEARCH, ranges=ranges)


def _searched(setting: Setting, value: float) -> Range:
    """The range of a setting around the base's value, within what is allowed."""
    search = setting.search
    assert search is not None and setting.low is not None
    low, high = search.low, search.high
    if search.factors:
        low, high = (factor * value for factor in search.factors)
    assert low is not None and high is not None
    low, high = max(low, setting.low), high if setting.high is None else min(high, setting.high)
    if setting.type is int:
        low, high = int(low), int(high)
    return Range(low=low, high=high, log=search.log)


def _from_file(path: Path) -> Space:
    try:
        text = path.read_text()
        value = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except FileNotFoundError as error:
        raise UserError(f"--sweep: no file at {path}; a preset is {', '.join(SWEEPS)}") from error
    except (ValueError, OSError) as error:  # not TOML, not JSON, not UTF-8, a folder
        raise UserError(f"--sweep: {path}: {error}".splitlines()[0]) from error
    if not isinstance(value, dict):
        raise UserError(f"--sweep: {path}: a table with 'method' and 'space' is expected")
    for key in value:
        if key not in ("method", "space", "baseline"):
            raise unknown(f"--sweep: {path}", key, ("method", "space", "baseline"))
    method = value.get("method", GRID)
    if method not in METHODS:
        raise unknown(f"--sweep: {path}: method", method, METHODS)
    where = f"--sweep: {path}"
    ranges = {
        name: _parsed(where, name, options)
        for name, options in _flat(where, value.get("space")).items()
    }
    if not ranges:
        raise UserError(f"{where}: 'space' is empty: name at least one setting")
    if method == SEARCH:
        if "baseline" in value:
            raise UserError(f"{where}: a search has no baseline; method = 'grid' has one")
        return Space(name=path.stem, method=SEARCH, ranges=ranges)
    baseline = _flat(where, value.get("baseline", {}))
    return Space(name=path.stem, method=GRID, arms=_product(where, ranges, baseline))


def _flat(where: str, value: Any) -> dict[str, Any]:
    """Flattens nested tables to dotted names: ``transforms.flip = …``, ``[space.transforms]``."""
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: 'space' and 'baseline' are tables of settings")
    settings: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping) and not set(item) & {"low", "high"}:
            settings |= {f"{key}.{name}": inner for name, inner in _flat(where, item).items()}
        else:
            settings[key] = item
    return settings


def _parsed(where: str, name: str, value: Any) -> Range | Choices:
    overrides.check_name(where, name)
    if name in _FIXED:
        raise UserError(f"{where}: {name} {_FIXED[name]}")
    setting = overrides.settings()[name]
    if setting.is_file:
        raise UserError(f"{where}: {name} is the same for all trials: use {setting.flag}")
    if isinstance(value, Mapping):
        return _range(where, name, value)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise UserError(
            f"{where}: {name}: {value!r} is neither a list of values nor a range such as "
            "{ low = 0.01, high = 0.3, log = true }; what is not varied is a flag"
        )
    values = tuple(overrides.check_value(where, name, choice) for choice in value)
    if not values or len({json.dumps(choice) for choice in values}) < len(values):
        raise UserError(f"{where}: {name}: at least one value is expected, none of them twice")
    return values


def _range(where: str, name: str, bounds: Mapping[str, Any]) -> Range:
    for key in bounds:
        if key not in _FIELDS_OF_A_RANGE:
            raise unknown(f"{where}: {name}", key, _FIELDS_OF_A_RANGE)
    if "low" not in bounds or "high" not in bounds:
        raise UserError(f"{where}: {name}: a range has both low and high")
    if not overrides.settings()[name].is_number:
        raise UserError(f"{where}: {name} is not a number: give a list of values")
    for key in ("low", "high"):
        overrides.check_value(where, name, bounds[key])
    low, high, log, step = (
        bounds["low"],
        bounds["high"],
        bounds.get("log", False),
        bounds.get("step"),
    )
    if not isinstance(log, bool):
        raise UserError(f"{where}: {name}: log is true or false, not {log!r}")
    if low >= high or (log and low <= 0):
        raise UserError(f"{where}: {name}: low has to be below high, and above 0 with log")
    is_number = isinstance(step, int | float) and not isinstance(step, bool)
    is_integer = overrides.settings()[name].type is int
    if step is not None and (
        log or not is_number or step <= 0 or (is_integer and step != int(step))
    ):
        raise UserError(f"{where}: {name}: step is a number above 0, and not beside log")
    return Range(low=low, high=high, log=log, step=step)


def _product(
    where: str, ranges: Mapping[str, Range | Choices], baseline: Mapping[str, Any]
) -> tuple[Arm, ...]:
    """All combinations, the baseline first."""
    lists: dict[str, Choices] = {}
    for name, options in ranges.items():
        if isinstance(options, Range):
            raise UserError(f"{where}: {name}: a grid takes lists; method = 'search' takes ranges")
        lists[name] = options
    count = math.prod(map(len, lists.values()))
    if count > _MOST_ARMS:
        raise UserError(f"{where}: {count} combinations; at most {_MOST_ARMS}, or a search")
    for name, value in baseline.items():
        if value not in lists.get(name, ()):
            raise UserError(f"{where}: baseline: {name} = {value!r} is not in 'space'")
    first = {name: baseline.get(name, values[0]) for name, values in lists.items()}
    arms = []
    for values in itertools.product(*lists.values()):
        settings = dict(zip(lists, values))
        label = ", ".join(
            f"{overrides.column_of(name)}={value}" for name, value in settings.items()
        )
        arms.append(Arm(name=label, options=settings))
    return tuple(sorted(arms, key=lambda arm: arm.options != first))
