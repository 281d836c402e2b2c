"""What all sources of files have in common: their entries, and the files that are refused."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

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


class FileSource(Protocol):
    """The files of a folder, a zip or a table.

    It is pickled and sent to workers, so its state has to be small.
    """

    path: str
    """Absolute local path, or URI."""

    def entries(self) -> Iterator[Entry]:
        """Lists all files one by one, in no particular order; each call lists them again.

        Raises:
            UserError: when the source cannot be listed.
        """

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
