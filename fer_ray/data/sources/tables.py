"""A CSV or Parquet table of picture files, their labels and, if it says so, their splits."""

from __future__ import annotations

import codecs
import csv
import io
import re
import unicodedata
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from fer_ray import storage
from fer_ray.data.sources.files import Entry, read_error
from fer_ray.data.sources.folders import read_file
from fer_ray.data.sources.layouts import SPLIT_FOLDERS
from fer_ray.data.sources.zips import hash_file
from fer_ray.errors import UserError, first_line

COLUMNS = ("path", "label")
"""What a table has to have; ``split`` may stand beside them."""

_ROWS = 4096
_REASON = "\0"  # no column's name: why the row cannot be used
_GAPS = re.compile(r"^([+-]?\d+)\.0$")
"""What pandas makes of whole numbers in a column with gaps."""
_LONGEST_PATH, _LONGEST_LABEL = 4096, 255


class TableSource:
    """The picture files that a table names: relative to its folder, absolute, or by URI.

    A row's path is its image's id. Without a column ``split`` everything is train.
    """

    kind = "table"

    def __init__(self, path: str) -> None:
        self.path = path

    @cached_property
    def has_splits(self) -> bool:
        """Whether the table says which split a picture belongs to."""
        return "split" in columns_of(self.path)

    def entries(self) -> Iterator[Entry]:
        """One entry a row."""
        for number, row in enumerate(_rows(self.path), start=1):
            yield _entry(number, row, has_splits=self.has_splits)

    def read(self, path: str, at: bytes) -> bytes:
        """The content of the file that a row names; see `Source.read`."""
        try:
            if storage.is_uri(path):
                fs, full = storage.filesystem(path)
                return read_file(fs, "", full)
            if path.startswith("/"):
                return read_file(pafs.LocalFileSystem(), "", path)
            return read_file(*self._folder, path)
        except (OSError, pa.ArrowException, UserError, ValueError) as error:
            if not storage.exists(self.path):
                raise UserError(f"--source: {self.path} is gone, or not on all machines") from error
            raise read_error(error) from error

    def fingerprint(self, listing: Iterator[tuple[str, int]]) -> str:
        """Hash of the table's bytes; the pictures' own are in ``data_sha256``."""
        return hash_file(self.path)

    @cached_property
    def _folder(self) -> tuple[pafs.FileSystem, str]:
        return storage.filesystem(storage.parent_of(self.path))

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}


def columns_of(path: str) -> list[str]:
    """The names of a table's columns, in lower case and without blanks around.

    Raises:
        UserError: when it is no such table.
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
    found = [str(name).strip().lower() for name in names]
    for name in (*COLUMNS, "split"):
        if found.count(name) > 1:
            raise UserError(f"--source: {path} has more than one column {name}")
    return found


def is_parquet(path: str) -> bool:
    """Whether a place is that of a Parquet file, by its name."""
    return storage.name_of(path).lower().endswith(".parquet")


def _rows(path: str) -> Iterator[dict[str, Any]]:
    """The rows of a table, columns by their names in lower case; in bounded memory."""
    fs, inner = storage.filesystem(path)
    names = columns_of(path)
    try:
        if is_parquet(path):
            with fs.open_input_file(inner) as file:
                for batch in pq.ParquetFile(file).iter_batches(_ROWS):
                    for values in zip(*(column.to_pylist() for column in batch.columns)):
                        yield dict(zip(names, values))
            return
        with fs.open_input_stream(inner) as stream:
            text = io.TextIOWrapper(stream, "utf-8-sig", errors="backslashreplace", newline="")
            reader = csv.reader(text)
            next(reader, None)
            for row in reader:
                if any("\n" in cell or "\r" in cell for cell in row):
                    raise UserError(
                        f"--source: {path}, before line {reader.line_num + 1}: a cell spans "
                        "several lines, as after a quote that is not closed"
                    )
                if row:
                    strange = len(row) > len(names)
                    reason = f"it has {len(row)} cells, the header has {len(names)}"
                    yield {**dict(zip(names, row)), **({_REASON: reason} if strange else {})}
    except (OSError, pa.ArrowException, csv.Error) as error:
        raise UserError(f"--source: {path} cannot be read: {first_line(error)}") from error


def _entry(number: int, row: dict[str, Any], *, has_splits: bool) -> Entry:
    path, label, split = (_text(row.get(name)) for name in (*COLUMNS, "split"))
    label = unicodedata.normalize("NFC", _GAPS.sub(r"\1", label))
    shown = path[:_LONGEST_PATH] or f"row {number}"
    if reason := row.get(_REASON):
        return Entry(path=shown, reason=reason)
    for name, text, most in (("path", path, _LONGEST_PATH), ("label", label, _LONGEST_LABEL)):
        if len(text) > most:
            return Entry(path=shown, reason=f"its {name} has {len(text):,} characters")
    if not path:
        return Entry(path=shown, reason="the row names no path")
    where = SPLIT_FOLDERS.get(split.lower()) if has_splits else "train"
    if where is None:
        return Entry(
            path=shown, reason=f"its split is {split[:40]!r}: not train, validation or test"
        )
    if not label and where != "test":
        return Entry(path=shown, reason="it has no label")
    return Entry(path=path, split=where, label=label or None)


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        value = value.decode(errors="backslashreplace")
    missing = value is None or value != value  # NaN
    return "" if missing else str(value).strip()
