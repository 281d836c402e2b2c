"""FER-2013 as it was published: a CSV whose rows are the pictures (``fer2013.csv``).

Its columns are ``emotion`` (0 to 6), ``pixels`` (2,304 grey values with blanks between) and
``Usage`` (Training, PublicTest, PrivateTest): Goodfellow et al. 2013, arXiv:1307.0414. The copy
called ``icml_face_data.csv`` has them in another order, with blanks before the names.
"""

from __future__ import annotations

import csv
import math
import struct
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from fer_ray import storage
from fer_ray.data.sources.files import Entry, ReadError
from fer_ray.data.sources.tables import columns_of
from fer_ray.data.sources.zips import hash_file
from fer_ray.errors import UserError, first_line

COLUMNS = frozenset({"emotion", "pixels", "usage"})
"""What the file has to have."""

EMOTIONS = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")
"""The labels of the codes 0 to 6, which are not in the alphabet's order."""

USAGES = {"training": "train", "publictest": "validation", "privatetest": "test"}
"""The splits of the column ``Usage``, in lower case."""

_AT = struct.Struct("<QL")
"""An entry's `at`: offset and length of the line."""
_BLOCK = 2**22
_MOST_SIDE = 1024
_LONGEST_LINE = 5 * _MOST_SIDE**2


class PixelRows:
    """The pictures in the rows of ``fer2013.csv``: `preparation.Pictures`.

    A row's id is ``line-0000002``, its line in the file: the header is line 1.
    """

    has_splits = True

    def __init__(self, path: str, given: str) -> None:
        self.path, self.given = path, given

    def entries(self) -> Iterator[Entry]:
        """Every row with its split and label, or with what is wrong about it."""
        try:
            for number, offset, size, line in _lines(self.path):
                if number > 1 and line.strip():
                    yield self._entry(number, offset, size, line)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"--source: {self.path} cannot be read: {first_line(error)}") from error

    def grey(self, entry_path: str, at: bytes) -> np.ndarray:
        """One picture, (side, side) uint8.

        Raises:
            ReadError: for pixels that are no square of numbers from 0 to 255.
        """
        offset, length = _AT.unpack(at)
        try:
            line = self._file.read_at(length, offset)
            pixels = _cells(line)[self._columns.index("pixels")]
        except (OSError, pa.ArrowException, IndexError) as error:
            raise ReadError(f"cannot be read: {first_line(error)}") from error
        return parse_pixels(pixels)

    def describe(self, listing: Iterator[tuple[str, int]]) -> dict[str, Any]:
        """What ``dataset.json`` says about the source."""
        return {"kind": "pixels", "path": self.given, "sha256": hash_file(self.path)}

    def _entry(self, number: int, offset: int, size: int, line: bytes) -> Entry:
        path = f"line-{number:07d}"
        if size > _LONGEST_LINE:
            return Entry(path=path, size=size, reason=f"a line of {size:,} bytes is no picture")
        cells, width = _cells(line), len(self._columns)
        if len(cells) != width:
            reason = f"{len(cells)} columns instead of {width}"
            return Entry(path=path, size=size, reason=reason)
        emotion, usage = (cells[self._columns.index(name)].strip() for name in ("emotion", "usage"))
        split = USAGES.get(usage.lower())
        if split is None:
            reason = f"Usage {usage[:40]!r} is not Training, PublicTest or PrivateTest"
            return Entry(path=path, size=size, reason=reason)
        at = _AT.pack(offset, size)
        if not emotion and split == "test":
            return Entry(path=path, size=size, at=at, split=split)
        if emotion not in ("0", "1", "2", "3", "4", "5", "6"):
            return Entry(path=path, size=size, reason=f"emotion {emotion!r} is not 0 to 6")
        label = EMOTIONS[int(emotion)]
        return Entry(path=path, size=size, at=at, split=split, label=label)

    @cached_property
    def _columns(self) -> list[str]:
        return columns_of(self.path)

    @cached_property
    def _file(self) -> pa.NativeFile:
        fs, path = storage.filesystem(self.path)
        try:
            return fs.open_input_file(path)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"--source: {self.path} is gone, or not on all machines") from error

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "given": self.given}


def parse_pixels(text: str) -> np.ndarray:
    """A square picture from its grey values, row by row, with blanks between.

    Returns:
        (side, side) uint8.

    Raises:
        ReadError: when they are no square, no whole numbers, or not within 0 to 255.
    """
    values = text.split()
    side = math.isqrt(len(values))
    if not values or side * side != len(values) or side > _MOST_SIDE:
        expected = 48 * 48
        raise ReadError(f"{len(values):,} pixels are no square picture ({expected:,} are usual)")
    # ASCII alone: isdigit takes every script's digits
    if not ("".join(values).isdigit() and text.isascii()):
        strange = next(one for one in values if not (one.isdigit() and one.isascii()))
        raise ReadError(f"a pixel is {strange[:20]!r}: not a whole number from 0 to 255")
    try:
        pixels = bytes(map(int, values))
    except ValueError as error:
        largest = max(values, key=lambda one: (len(one.lstrip("0")), one.lstrip("0")))
        raise ReadError(f"a pixel is {largest[:20]}: beyond 255") from error
    return np.frombuffer(pixels, np.uint8).reshape(side, side)


def _cells(line: bytes) -> list[str]:
    """The cells of a line; one that is no CSV has none."""
    csv.field_size_limit(_LONGEST_LINE)
    try:
        return next(csv.reader([line.decode("utf-8", "backslashreplace")], strict=True), [])
    except csv.Error:
        return []


def _lines(path: str) -> Iterator[tuple[int, int, int, bytes]]:
    """Number from 1, offset, length and content of each line, without its end.

    In bounded memory: of a line that is too long for a picture only the beginning is kept.
    """
    fs, inner = storage.filesystem(path)
    number, offset, rest, dropped = 1, 0, b"", 0
    with fs.open_input_stream(inner) as stream:
        while block := stream.read(_BLOCK):
            *whole, rest = (rest + block).split(b"\n")
            for line in whole:
                yield number, offset, len(line.rstrip(b"\r")) + dropped, line.rstrip(b"\r")
                number, offset, dropped = number + 1, offset + len(line) + dropped + 1, 0
            if len(rest) > _LONGEST_LINE:
                dropped, rest = dropped + len(rest) - _LONGEST_LINE, rest[:_LONGEST_LINE]
        if rest:
            yield number, offset, len(rest.rstrip(b"\r")) + dropped, rest.rstrip(b"\r")
