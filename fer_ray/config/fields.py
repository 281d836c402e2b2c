"""Sections of the configuration: frozen dataclasses whose fields check and describe themselves.

A field is declared with `choice`, `number` or `file`, or has a plain
default, and is documented by the string
under it. Everything else follows from that: its check, its flag with help and range, its column,
and what a sweep may vary.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import math
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from fer_ray.errors import UserError, not_one_of, unknown
from fer_ray.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Search:
    """What the preset sweep `search` draws a number from."""

    low: float | None = None
    """Lowest value; None: `factors` times the base's."""
    high: float | None = None
    """Highest value; None: `factors` times the base's."""
    factors: tuple[float, float] | None = None
    """Lowest and highest value as multiples of the base's value."""
    log: bool = False
    """Whether to draw evenly on a logarithmic scale."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting: what is allowed, what it is called, what it does."""

    section: str
    """Section of the configuration, such as ``optimizer``."""
    field: str
    """Name within the section, such as ``learning_rate``."""
    type: type
    """`int`, `float`, `bool` or `str`."""
    default: Any
    """Default value; None where it follows from other settings (`Section.derived`)."""
    doc: str
    """What it does: the help of its flag."""
    flag: str
    """Such as ``--learning-rate``."""
    allowed: Sequence[str] | Registry[Any] | None = None
    """Names that are allowed; None: not a choice."""
    low: float | None = None
    """Least value of a number."""
    high: float | None = None
    """Greatest value of a number; None: no bound."""
    search: Search | None = None
    """How the preset sweep `search` varies it; None: not at all."""
    is_file: bool = False
    """Whether it names a file, unless it is one of `names`."""
    names: tuple[str, ...] = ()
    """Values of a text that are no path of a file."""
    owners: tuple[str, ...] = ()
    """Models that have it; empty: all."""

    @property
    def name(self) -> str:
        """The dotted name, such as ``optimizer.learning_rate``."""
        return f"{self.section}.{self.field}"

    @property
    def column(self) -> str:
        """The name in tables: the flag's, with underscores."""
        return self.flag[2:].replace("-", "_")

    @property
    def is_number(self) -> bool:
        """Whether its values are numbers."""
        return self.low is not None

    @property
    def bounds(self) -> str:
        """What is allowed, in words: ``from 0 to 1``, ``at least 1``; empty for other types."""
        if self.low is None:
            return ""
        if self.high is None:
            return f"at least {self.low:g}"
        return f"from {self.low:g} to {self.high:g}"

    def check(self, value: Any) -> None:
        """Raises `UserError`, which names the flag, where a value is not allowed."""
        if reason := self.refusal(value):
            raise UserError(f"{self.flag}: {reason}")

    def refusal(self, value: Any) -> str | None:
        """Why a value is not allowed, and what is; None where it is allowed."""
        if self.allowed is not None:
            return None if value in tuple(self.allowed) else not_one_of(value, self.allowed)
        if self.type is bool:
            return None if isinstance(value, bool) else f"{value!r} is not true or false"
        if self.type is str:
            return None if isinstance(value, str) else f"{value!r} is not text"
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or (self.type is int and not isinstance(value, int)):
            return f"{value!r} is not {self.bounds}{self._nearest(value)}"
        assert self.low is not None
        if not (self.low <= value and (self.high is None or value <= self.high)):
            return f"{value!r} is not {self.bounds}{self._nearest(value)}"
        return (
            None if isinstance(value, int) or math.isfinite(value) else f"{value!r} is not finite"
        )

    def _nearest(self, value: Any) -> str:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return ""
        if isinstance(value, float) and math.isnan(value):  # of an int it would overflow
            return ""
        assert self.low is not None
        near = max(min(value, math.inf if self.high is None else self.high), self.low)
        if not math.isfinite(near):
            return ""
        return f"; the nearest allowed value is {round(near) if self.type is int else near:g}"


def choice(
    default: str, allowed: tuple[str, ...] | Registry[Any], *, flag: str | None = None
) -> Any:
    """Declares a field that takes one of some names."""
    return field(default=default, metadata={"allowed": allowed, "flag": flag})


def number(
    default: Any,
    low: float,
    high: float | None = None,
    *,
    flag: str | None = None,
    search: Search | None = None,
) -> Any:
    """Declares a field that takes a number within bounds, both included.

    Args:
        default: None where the section's `derived` gives it.
        low: the least value.
        high: the greatest value; None: no bound, but finite.
        flag: the flag's name without dashes; by default the field's.
        search: how the preset sweep `search` varies it.
    """
    metadata = {"low": low, "high": high, "flag": flag, "search": search}
    return field(default=default, metadata=metadata)


def file(*, names: tuple[str, ...] = (), flag: str | None = None) -> Any:
    """Declares a field that takes the path of a file, or one of some names; empty by default."""
    return field(default="", metadata={"is_file": True, "names": names, "flag": flag})


def flag_name(field_name: str) -> str:
    """The flag of a field's name: ``--learning-rate`` of ``learning_rate``."""
    return "--" + field_name.replace("_", "-")


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the configuration, whose fields are declared with the functions above."""

    section: ClassVar[str]
    """The part's name in configurations and dotted names."""

    def __post_init__(self) -> None:
        """Fills in what follows from other fields, then checks every field."""
        derived = self.derived()
        for setting in self.settings():
            if getattr(self, setting.field) is None and setting.field in derived:
                object.__setattr__(self, setting.field, derived[setting.field])
            setting.check(getattr(self, setting.field))

    def derived(self) -> dict[str, Any]:
        """Values, by field, of fields whose default follows from other fields."""
        return {}

    @classmethod
    def settings(cls) -> tuple[Setting, ...]:
        """The settings that the fields declare, in order."""
        return _settings(cls)  # type: ignore[arg-type]  # classes can be hashed

    def to_dict(self) -> dict[str, Any]:
        """Every field's value by name, as JSON types."""
        return {setting.field: getattr(self, setting.field) for setting in self.settings()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; absent fields get their defaults.

        Raises:
            UserError: for an unknown field, or a value that is not allowed.
        """
        names = [setting.field for setting in cls.settings()]
        for key in values:
            if key not in names:
                raise unknown(cls.section, key, names)
        return cls(**values)


@functools.cache
def _settings(section: Any) -> tuple[Setting, ...]:
    types_of, docs = typing.get_type_hints(section), field_docs(section)
    settings = []
    for spec in dataclasses.fields(section):
        if not spec.init:
            continue  # filled in from settings that come from elsewhere
        metadata = {key: value for key, value in spec.metadata.items() if key != "flag"}
        settings.append(
            Setting(
                section=section.section,
                field=spec.name,
                type=_plain_type(types_of[spec.name]),
                default=spec.default,
                doc=docs[spec.name],
                flag=flag_name(spec.metadata.get("flag") or spec.name),
                **metadata,
            )
        )
    return tuple(settings)


def _plain_type(annotation: Any) -> type:
    """`float` of ``float | None``."""
    if isinstance(annotation, types.UnionType):
        (annotation,) = set(typing.get_args(annotation)) - {type(None)}
    assert annotation in (int, float, bool, str), annotation
    return annotation


def field_docs(section: type) -> dict[str, str]:
    """The string under each field of a dataclass and its bases, by the field's name."""
    docs: dict[str, str] = {}
    names = {spec.name for spec in dataclasses.fields(section)}
    for base in reversed(section.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(body, ast.ClassDef)
        for item, following in zip(body.body, body.body[1:]):
            if not (isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)):
                continue
            if item.target.id in names:
                name = f"{base.__name__}.{item.target.id}"
                assert isinstance(following, ast.Expr), f"{name} has no docstring"
                assert isinstance(following.value, ast.Constant), f"{name} has no docstring"
                docs[item.target.id] = " ".join(str(following.value.value).split())
    return docs


class FrozenMapping(Mapping[str, Any]):
    """A mapping that is not changed, so that frozen dataclasses that hold it can be hashed."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        """Copies `values`."""
        self._values = dict(values)

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(frozenset(self._values.items()))

    def __repr__(self) -> str:
        return repr(self._values)
