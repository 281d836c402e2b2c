"""Values of JSON files, checked when they are read: errors name the file and the key."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable, Iterator
from typing import Any

from fer_ray import storage
from fer_ray.errors import UserError

MAX_COUNT = 10**12
"""Largest number of rows or bytes that a file may state."""

_SHA256 = re.compile("[0-9a-f]{64}")


class Record:
    """A JSON object of a file; each method returns the value of a key, or raises `UserError`."""

    def __init__(self, path: str, value: Any, *, advice: str = "", within: str = "") -> None:
        """Takes an object that was read.

        Args:
            path: the file's path, for messages.
            value: the JSON value.
            advice: what to do about a damaged file; the end of messages.
            within: the key of this object in the file, such as ``splits.train.``.

        Raises:
            UserError: where the value is not an object.
        """
        self.path, self.advice, self._within = path, advice, within
        if not isinstance(value, dict):
            raise self.error(f"{within.rstrip('.') or 'its content'} is {_short(value)}", "object")
        self.value: dict[str, Any] = value

    def error(self, problem: str, expected: str = "") -> UserError:
        """Builds the error for a wrong value."""
        end = f", not a JSON {expected}" if expected else ""
        return damaged(self.path, f"{problem}{end}", self.advice)

    def get(self, key: str, expected: str, accepts: Callable[[Any], bool]) -> Any:
        """The value of a key; `expected` describes in messages what `accepts` is true for."""
        if key not in self.value:
            raise self.error(f"{self._within}{key} is missing")
        value = self.value[key]
        if not accepts(value):
            raise self.error(f"{self._within}{key} is {_short(value)}, not {expected}")
        return value

    def text(self, key: str) -> str:
        """A string."""
        return self.get(key, "a text", lambda value: isinstance(value, str))

    def name(self, key: str) -> str:
        """A plain name: one path component."""
        return self.get(key, "a plain name", is_name)

    def sha256(self, key: str) -> str:
        """A SHA-256 in hexadecimal."""
        return self.get(
            key, "a SHA-256", lambda v: isinstance(v, str) and bool(_SHA256.fullmatch(v))
        )

    def boolean(self, key: str) -> bool:
        """True or false."""
        return self.get(key, "true or false", lambda value: isinstance(value, bool))

    def integer(self, key: str, low: int = 0, high: int = MAX_COUNT) -> int:
        """A whole number between `low` and `high`, both included."""
        return self.get(
            key,
            f"a whole number between {low} and {high}",
            lambda value: type(value) is int and low <= value <= high,
        )

    def number(self, key: str, low: float = -math.inf, high: float = math.inf) -> float:
        """A finite number between `low` and `high`, both included."""
        bounds = f" between {low:g} and {high:g}" if math.isfinite(low) else ""
        return self.get(
            key, f"a finite number{bounds}", lambda v: is_finite(v) and low <= float(v) <= high
        )

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of different strings, none of them empty."""
        return tuple(self.get(key, "a list of different texts", _are_different_texts))

    def names(self, key: str) -> tuple[str, ...]:
        """A list of different plain names."""
        return tuple(
            self.get(
                key,
                "a list of different plain names",
                lambda value: _are_different_texts(value) and all(map(is_name, value)),
            )
        )

    def list(self, key: str) -> list[Any]:
        """A list."""
        return self.get(key, "a list", lambda value: isinstance(value, list))

    def record(self, key: str) -> Record:
        """An object, whose values are checked in the same way."""
        value = self.get(key, "an object", lambda value: isinstance(value, dict))
        return Record(self.path, value, advice=self.advice, within=f"{self._within}{key}.")

    def records(self) -> Iterator[tuple[str, Record]]:
        """Every key with its value, all of which have to be objects."""
        return ((key, self.record(key)) for key in self.value)


def damaged(path: str, reason: str, advice: str = "") -> UserError:
    """Builds the error for a file that does not hold what it should."""
    return UserError(f"{path} is damaged: {reason}{f': {advice}' if advice else ''}")


def is_name(value: Any) -> bool:
    """Whether a value is a plain name: one path component without special characters."""
    return isinstance(value, str) and storage.is_plain_name(value)


def is_finite(value: Any) -> bool:
    """Whether a value is a finite number, and not true or false."""
    # an int beyond 1e308 has no float
    return type(value) in (int, float) and abs(value) < 1e308


def _are_different_texts(value: Any) -> bool:
    if not isinstance(value, list) or not all(isinstance(text, str) and text for text in value):
        return False
    return len(set(value)) == len(value)


def _short(value: Any) -> str:
    """A value in a few words: files may hold megabytes where a name is expected."""
    return reprlib.repr(value)
