"""A CSV or Parquet table with the paths of image files, their labels and optionally splits."""

from __future__ import annotations

import codecs
import csv
import io
import re
import unicodedata
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from fer_ray import storage
from fer_ray.data import decoding
from fer_ray.data.image_source import SOURCES, ImageSource, SourceOptions, SourceType
from fer_ray.data.sources.files import Entry, hash_file, read_error
from fer_ray.data.sources.folders import read_file
from fer_ray.data.sources.layouts import SPLIT_FOLDERS
from fer_ray.errors import UserError, first_line

COLUMNS = ("path", "label")
"""The columns that a table needs; ``split`` is optional."""

_ROWS = 4096
_REASON = "\0"
"""Key of a row's reason for being unusable; no column has this name."""
_FRACTION_ZERO = re.compile(r"^([+-]?\d+)\.0$")
"""What pandas writes for whole numbers in a column with gaps."""
_MAX_PATH, _MAX_LABEL = 4096, 255


class TableImageSource:
    """The image files that a table names, as an `ImageSource`.

    Paths are relative to the table's folder, absolute, or URIs; as written they are the ids of
    the images. Without a column ``split`` all images are train.
    """

    def __init__(self, path: str, source: str) -> None:
        """Opens the table when it is first read.

        Args:
            path: absolute path or URI of the table.
            source: the value of ``--source``, for ``dataset.json``.
        """
        self.path, self.source = path, source

    @cached_property
    def has_splits(self) -> bool:
        """See `ImageSource.has_splits`."""
        return "split" in columns_of(self.path)

    def entries(self) -> Iterator[Entry]:
        """See `ImageSource.entries`; one entry for each row."""
        for number, row in enumerate(_rows(self.path), start=1):
            yield _entry(number, row, has_splits=self.has_splits)

    def grey(self, path: str, at: bytes) -> np.ndarray:
        """See `ImageSource.grey`."""
        return decoding.decode(self.read(path))

    def read(self, path: str) -> bytes:
        """Returns the content of a file that the table names.

        Raises:
            ReadError: when the file cannot be read.
            UserError: when the table itself no longer exists.
        """
        try:
            if storage.is_uri(path):
                fs, full = storage.filesystem(path)
                return read_file(fs, "", full)
            if path.startswith("/"):
                return read_file(pafs.LocalFileSystem(), "", path)
            return read_file(*self._folder, path)
        except (OSError, pa.ArrowException, UserError, ValueError) as error:
            if not storage.exists(self.path):
                raise UserError(
                    f"--source: {self.path} no longer exists, or not on all machines"
                ) from error
            raise read_error(error) from error

    def describe(self, listing: Iterator[tuple[str, int]]) -> dict[str, Any]:
        """See `ImageSource.describe`; the hash is that of the table, without the images."""
        return {"path": self.source, "sha256": hash_file(self.path)}

    @cached_property
    def _folder(self) -> tuple[pafs.FileSystem, str]:
        return storage.filesystem(storage.parent_of(self.path))

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "source": self.source}


def _open(source: str, options: SourceOptions) -> ImageSource:
    path = storage.absolute(source)
    names = columns_of(path)
    if not set(names) >= set(COLUMNS):
        raise UserError(
            f"--source: {path} has the columns {', '.join(names)[:200] or '(none)'}: expected "
            f"{' and '.join(COLUMNS)}, optionally split; or those of fer2013.csv: emotion, "
            "pixels, Usage"
        )
    return TableImageSource(path, source)


SOURCES.register("table")(
    SourceType(
        description="a .csv or .parquet table with the columns path, label and optionally split",
        recognizes=lambda source: is_table(source),
        open=_open,
    )
)


def is_table(path: str) -> bool:
    """Whether a path is that of an existing CSV or Parquet file, by its name."""
    has_suffix = storage.name_of(path).lower().endswith((".csv", ".parquet"))
    return has_suffix and storage.exists(path) and not storage.is_directory(path)


def is_parquet(path: str) -> bool:
    """Whether a path is that of a Parquet file, by its name."""
    return storage.name_of(path).lower().endswith(".parquet")


def columns_of(path: str) -> list[str]:
    """Returns the names of a table's columns, in lower case and stripped of blanks.

    Raises:
        UserError: when the table cannot be read, or has one of the known columns twice.
    """
    try:
        fs, inner = storage.filesystem(path)
        if is_parquet(path):
            with fs.open_input_file(inner) as file:
                names = pq.read_schema(file).names
        else:
            with fs.open_input_stream(inner) as stream:
                head = stream.read(2**16)
            if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise UserError(f"--source: {path} is UTF-16: save it as UTF-8")
            text = io.StringIO(head.decode("utf-8-sig", "replace"))
            names = next(csv.reader(text), [])
    except (OSError, pa.ArrowException, csv.Error) as error:
        raise UserError(f"--source: {path} cannot be read: {first_line(error)}") from error
    columns = [str(name).strip().lower() for name in names]
    for name in (*COLUMNS, "split"):
        if columns.count(name) > 1:
            raise UserError(f"--source: {path} has more than one column {name}")
    return columns


def _rows(path: str) -> Iterator[dict[str, Any]]:
    """Yields the rows of a table as values by column name; reads it in blocks."""
    names = columns_of(path)
    try:
        if is_parquet(path):
            yield from _parquet_rows(path, names)
        else:
            yield from _csv_rows(path, names)
    except (OSError, pa.ArrowException, csv.Error) as error:
        raise UserError(f"--source: {path} cannot be read: {first_line(error)}") from error


def _parquet_rows(path: str, names: list[str]) -> Iterator[dict[str, Any]]:
    fs, inner = storage.filesystem(path)
    with fs.open_input_file(inner) as file:
        for batch in pq.ParquetFile(file).iter_batches(_ROWS):
            for values in zip(*(column.to_pylist() for column in batch.columns)):
                yield dict(zip(names, values))


def _csv_rows(path: str, names: list[str]) -> Iterator[dict[str, Any]]:
    fs, inner = storage.filesystem(path)
    with fs.open_input_stream(inner) as stream:
        text = io.TextIOWrapper(stream, "utf-8-sig", errors="backslashreplace", newline="")
        reader = csv.reader(text)
        next(reader, None)
        for cells in reader:
            if any("\n" in cell or "\r" in cell for cell in cells):
                raise UserError(
                    f"--source: {path}, before line {reader.line_num + 1}: a cell spans several "
                    "lines; perhaps a quote is not closed"
                )
            if not cells:
                continue
            row = dict(zip(names, cells))
            if len(cells) > len(names):
                row[_REASON] = f"it has {len(cells)} cells, the header has {len(names)}"
            yield row


def _entry(number: int, row: dict[str, Any], *, has_splits: bool) -> Entry:
    path, label, split = (_text(row.get(name)) for name in (*COLUMNS, "split"))
    label = unicodedata.normalize("NFC", _FRACTION_ZERO.sub(r"\1", label))
    shown = path[:_MAX_PATH] or f"row {number}"
    if reason := row.get(_REASON):
        return Entry(path=shown, reason=reason)
    for name, text, most in (("path", path, _MAX_PATH), ("label", label, _MAX_LABEL)):
        if len(text) > most:
            return Entry(path=shown, reason=f"its {name} has {len(text):,} characters")
    if not path:
        return Entry(path=shown, reason="the row has no path")
    target = SPLIT_FOLDERS.get(split.lower()) if has_splits else "train"
    if target is None:
        return Entry(
            path=shown, reason=f"its split is {split[:40]!r}: not train, validation or test"
        )
    if not label and target != "test":
        return Entry(path=shown, reason="it has no label")
    return Entry(path=path, split=target, label=label or None)


def _text(value: Any) -> str:
    """Converts a cell to text: bytes are decoded, nulls and NaN become empty."""
    if isinstance(value, bytes):
        value = value.decode(errors="backslashreplace")
    is_missing = value is None or value != value  # only NaN differs from itself
    return "" if is_missing else str(value).strip()
