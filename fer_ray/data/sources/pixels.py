"""FER-2013 as it was published: ``fer2013.csv``, with the pixels of one image in each row.

Its columns are ``emotion`` (0 to 6), ``pixels`` (2,304 grey values separated by blanks) and
``Usage`` (Training, PublicTest, PrivateTest): Goodfellow et al. 2013, arXiv:1307.0414. In the
copy named ``icml_face_data.csv`` the columns have another order and blanks before their names.
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
from fer_ray.data.image_source import SOURCES, ImageSource, SourceOptions, SourceType
from fer_ray.data.sources.files import Entry, ReadError, hash_file
from fer_ray.data.sources.tables import columns_of, is_parquet, is_table
from fer_ray.errors import UserError, first_line

COLUMNS = frozenset({"emotion", "pixels", "usage"})
"""The columns that the file needs, in lower case."""

EMOTIONS = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")
"""The labels of the codes 0 to 6; the order is not alphabetical."""

USAGES = {"training": "train", "publictest": "validation", "privatetest": "test"}
"""The splits for the values of the column ``Usage``, in lower case."""

_AT = struct.Struct("<QL")
"""An entry's `at`: offset and length of its line, in bytes."""
_BLOCK = 2**22
_MAX_SIDE = 1024
_MAX_LINE = 5 * _MAX_SIDE**2


class PixelImageSource:
    """The images in the rows of ``fer2013.csv``, as an `ImageSource`.

    A row's path is its line in the file, as in ``line-0000002``; the header is line 1.
    """

    has_splits = True

    def __init__(self, path: str, source: str) -> None:
        """Opens the file when it is first read.

        Args:
            path: absolute path or URI.
            source: the value of ``--source``, for ``dataset.json``.
        """
        self.path, self.source = path, source

    def entries(self) -> Iterator[Entry]:
        """See `ImageSource.entries`; empty lines are skipped."""
        try:
            for number, offset, size, line in _lines(self.path):
                if number > 1 and line.strip():
                    yield self._entry(number, offset, size, line)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"--source: {self.path} cannot be read: {first_line(error)}") from error

    def grey(self, path: str, at: bytes) -> np.ndarray:
        """See `ImageSource.grey`; the image is square."""
        offset, length = _AT.unpack(at)
        try:
            line = self._file.read_at(length, offset)
            pixels = _cells(line)[self._columns.index("pixels")]
        except (OSError, pa.ArrowException, IndexError) as error:
            raise ReadError(f"cannot be read: {first_line(error)}") from error
        return parse_pixels(pixels)

    def describe(self, listing: Iterator[tuple[str, int]]) -> dict[str, Any]:
        """See `ImageSource.describe`."""
        return {"path": self.source, "sha256": hash_file(self.path)}

    def _entry(self, number: int, offset: int, size: int, line: bytes) -> Entry:
        path = f"line-{number:07d}"
        if size > _MAX_LINE:
            return Entry(path=path, size=size, reason=f"the line is too long: {size:,} bytes")
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
            raise UserError(
                f"--source: {self.path} no longer exists, or not on all machines"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "source": self.source}


def _recognizes(source: str) -> bool:
    return is_table(source) and not is_parquet(source) and set(columns_of(source)) >= COLUMNS


def _open(source: str, options: SourceOptions) -> ImageSource:
    return PixelImageSource(storage.absolute(source), source)


SOURCES.register("pixels")(
    SourceType(
        description="fer2013.csv with the columns emotion, pixels and Usage",
        recognizes=_recognizes,
        open=_open,
        precedence=1,  # before "table", which recognizes every CSV file
    )
)


def parse_pixels(text: str) -> np.ndarray:
    """Parses a square image: its grey values in decimal, row by row, separated by blanks.

    Returns:
        (side, side) uint8.

    Raises:
        ReadError: when the number of values is not a square, or a value is not a whole number
            from 0 to 255.
    """
    values = text.split()
    side = math.isqrt(len(values))
    if not values or side * side != len(values) or side > _MAX_SIDE:
        raise ReadError(f"{len(values):,} pixels are not a square image (usual: 48 x 48 = 2,304)")
    # isdigit alone would accept the digits of every script
    if not ("".join(values).isdigit() and text.isascii()):
        wrong = next(value for value in values if not (value.isdigit() and value.isascii()))
        raise ReadError(f"a pixel is {wrong[:20]!r}: not a whole number from 0 to 255")
    try:
        pixels = bytes(map(int, values))
    except ValueError as error:
        largest = max(values, key=lambda value: (len(value.lstrip("0")), value.lstrip("0")))
        raise ReadError(f"a pixel is {largest[:20]}: larger than 255") from error
    return np.frombuffer(pixels, np.uint8).reshape(side, side)


def _cells(line: bytes) -> list[str]:
    """Returns the cells of a line; none if the line is not valid CSV."""
    csv.field_size_limit(_MAX_LINE)
    try:
        return next(csv.reader([line.decode("utf-8", "backslashreplace")], strict=True), [])
    except csv.Error:
        return []


def _lines(path: str) -> Iterator[tuple[int, int, int, bytes]]:
    """Yields each line's number from 1, its offset and length in bytes, and its content.

    The line end is left out. Memory is bounded: only the beginning of a very long line is kept.
    """
    fs, inner = storage.filesystem(path)
    number, offset, rest, dropped = 1, 0, b"", 0
    with fs.open_input_stream(inner) as stream:
        while block := stream.read(_BLOCK):
            *complete, rest = (rest + block).split(b"\n")
            for line in complete:
                yield number, offset, len(line.rstrip(b"\r")) + dropped, line.rstrip(b"\r")
                number, offset, dropped = number + 1, offset + len(line) + dropped + 1, 0
            if len(rest) > _MAX_LINE:
                dropped, rest = dropped + len(rest) - _MAX_LINE, rest[:_MAX_LINE]
        if rest:
            yield number, offset, len(rest.rstrip(b"\r")) + dropped, rest.rstrip(b"\r")
