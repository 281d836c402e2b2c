"""What all sources of files have in common: their entries, and the files that are refused."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa

from fer_ray import storage
from fer_ray.errors import first_line

MAX_FILE_BYTES = 64 * 2**20
"""Larger files are not read: they are no crops of faces, or zip bombs."""

NOT_FOUND = f"cannot be read: {os.strerror(errno.ENOENT)}"
"""The reason for a file that does not exist on this machine; it may exist on others."""

REPEATED = "another file or row has the same path"
"""The reason for the second and all further entries with the same path."""
RELABELLED = f"{REPEATED} and another label"
"""The same, where the label differs from that of the first entry."""

_SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini"})


class ReadError(Exception):
    """A file of a source that cannot be read; the message is the reason in plain words."""


class NotFoundError(ReadError):
    """A file that this process does not see; one on another machine may."""

    def __init__(self) -> None:
        """The message is `NOT_FOUND`."""
        super().__init__(NOT_FOUND)


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One file of a source, or one row of a table of images."""

    path: str
    """Path within the source, components separated by ``/``; the image's id."""
    size: int = 0
    """Size in bytes, uncompressed."""
    at: bytes = b""
    """Where the file lies, in the source's own encoding, so that workers need not list again."""
    split: str | None = None
    """``train``, ``validation`` or ``test``; None until the layout is known."""
    label: str | None = None
    """Class name; None where it is not known."""
    reason: str | None = None
    """Why the file cannot become an image of the dataset, in plain words; None if it can."""


ENTRIES = pa.schema(
    [
        ("path", pa.string()),
        ("size", pa.int64()),
        ("at", pa.binary()),
        ("split", pa.string()),
        ("label", pa.string()),
        ("reason", pa.string()),
    ]
)
"""Columns of a table of entries; their meaning is that of the fields of `Entry`."""

_ROWS = 8192
_ROWS_AS_ENTRIES = 1024
"""Rows that are converted to `Entry` objects at a time, which take more memory than columns."""


def tables_of(entries: Iterable[Entry]) -> Iterator[pa.Table]:
    """Yields entries as tables with the columns of `ENTRIES`, in the same order."""
    remaining = iter(entries)
    while batch := list(itertools.islice(remaining, _ROWS)):
        columns = [[getattr(entry, name) for entry in batch] for name in ENTRIES.names]
        yield table_of(columns)


def table_of(columns: Sequence[Sequence[object]]) -> pa.Table:
    """Returns columns, in the order of `ENTRIES`, as a table."""
    arrays = [pa.array(column, field.type) for column, field in zip(columns, ENTRIES)]
    return pa.Table.from_arrays(arrays, schema=ENTRIES)


def entries_of(tables: Iterable[pa.Table]) -> Iterator[Entry]:
    """Yields the rows of tables with the columns of `ENTRIES` as entries."""
    for table in tables:
        for start in range(0, len(table), _ROWS_AS_ENTRIES):
            part = table.slice(start, _ROWS_AS_ENTRIES)
            for row in zip(*(column.to_pylist() for column in part.columns)):
                yield Entry(**dict(zip(ENTRIES.names, row)))


class Listing:
    """A list of files in a temporary file on disk: written once, and read without the source."""

    def __init__(self) -> None:
        """Creates an empty one; its file is deleted together with it."""
        self._file = tempfile.TemporaryFile(prefix="fer_ray-listing-")  # noqa: SIM115

    def record(self, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """Yields tables with the columns of `ENTRIES`, and writes each of them."""
        with pa.ipc.new_stream(self._file, ENTRIES) as stream:
            for table in tables:
                stream.write_table(table)
                yield table

    def tables(self) -> Iterator[pa.Table]:
        """Yields the tables that were written; they have to be complete."""
        self._file.seek(0)
        with pa.ipc.open_stream(self._file) as stream:
            for batch in stream:
                yield pa.Table.from_batches([batch])


class FileSource(Protocol):
    """The files of a folder, a zip or a table.

    It is pickled and sent to workers, so its state has to be small.
    """

    path: str
    """Absolute local path, or URI."""

    def tables(self) -> Iterator[pa.Table]:
        """Lists all files in tables of limited size, in no particular order.

        The columns are those of `ENTRIES`. Each call lists the files again.

        Raises:
            UserError: when the source cannot be listed.
        """

    def entries(self) -> Iterator[Entry]:
        """Lists all files one by one, as `tables` does."""

    def read(self, path: str, at: bytes) -> bytes:
        """Returns the content of one file.

        Args:
            path: the entry's path.
            at: the entry's location.

        Raises:
            ReadError: when the file cannot be read; `NotFoundError` when it does not exist.
            UserError: when the whole source cannot be reached.
        """

    def fingerprint(self, listing: Iterator[tuple[str, int]]) -> str:
        """Returns the SHA-256 of a zip's or table's bytes, or of a folder's listing.

        Args:
            listing: paths and sizes of all entries, ordered by path.
        """


def list_files(source: FileSource) -> tuple[list[Entry], list[Entry]]:
    """Lists all files of a source, whatever its layout.

    Returns:
        Two lists ordered by path: the files that may be images, each path once (with a `reason`
        where a file cannot be read), and the files that were skipped, each with its `reason`.
    """
    files: dict[str, Entry] = {}
    skipped: list[Entry] = []
    for entry in source.entries():
        previous = files.get(entry.path)
        if reason := system_file_reason(entry.path):
            skipped.append(Entry(path=entry.path, reason=reason))
        elif previous is None:
            files[entry.path] = entry
        elif previous.reason and not entry.reason:  # of equal paths a readable file wins
            skipped.append(previous)
            files[entry.path] = entry
        else:
            skipped.append(Entry(path=entry.path, reason=entry.reason or REPEATED))
    return [files[path] for path in sorted(files)], sorted(skipped, key=lambda entry: entry.path)


def system_file_reason(path: str) -> str | None:
    """Returns why a path cannot be that of an image (hidden and system files), else None."""
    name = path.rpartition("/")[2]
    if name.lower() in _SYSTEM_FILES or name == ".DS_Store":
        return "a file of the operating system"
    if "__MACOSX/" in path and "__MACOSX" in path.split("/"):
        return "a file of the operating system"
    if path.startswith(".") or "/." in path:
        return "a hidden file"
    return None


def check_size(size: int) -> None:
    """Refuses files above `MAX_FILE_BYTES`.

    Raises:
        ReadError: when the file is too large.
    """
    if size > MAX_FILE_BYTES:
        raise ReadError(f"{size:,} bytes: larger than {MAX_FILE_BYTES:,}")


def read_error(error: Exception) -> ReadError:
    """Builds the `ReadError` for an exception; a `NotFoundError` for a missing file."""
    is_missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
    return NotFoundError() if is_missing else ReadError(f"cannot be read: {first_line(error)}")


def hash_file(path: str) -> str:
    """Returns the SHA-256 of a file's bytes, in hexadecimal."""
    fs, inner = storage.filesystem(path)
    digest = hashlib.sha256()
    with fs.open_input_stream(inner) as stream:
        while block := stream.read(2**22):
            digest.update(block)
    return digest.hexdigest()
