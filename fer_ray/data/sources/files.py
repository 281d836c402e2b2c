"""What every source of files has in common: its entries, and how one of them is read."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from fer_ray.errors import first_line

MAX_FILE_BYTES = 64 * 2**20
"""The largest file that is read: above, it is not a crop of a face, or a zip bomb."""

NOT_THERE = f"cannot be read: {os.strerror(errno.ENOENT)}"
"""The reason of a file that this process does not see; one on another machine may."""

_SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini"})


class ReadError(Exception):
    """One file of a source that cannot be read, with the reason in plain words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One file of a source, or one row of a table of pictures."""

    path: str
    """Path inside the source, with ``/`` between the components; what it is known by."""
    size: int = 0
    """Bytes, unpacked."""
    at: bytes = b""
    """Where the source finds it again without listing anew; only the source understands it."""
    split: str | None = None
    """``train``, ``validation`` or ``test``; None until the layout is known."""
    label: str | None = None
    """Class; None where it is not known."""
    reason: str | None = None
    """Why it does not become a row, in plain words; None where it may."""


class Source(Protocol):
    """The files of a folder, a zip or a table. Cheap to send to workers, which read from it."""

    kind: str
    """``folder``, ``zip`` or ``table``."""
    path: str
    """Absolute local path or URI."""

    def entries(self) -> Iterator[Entry]:
        """Lists every file, one after the other and in no order; listed anew by each call.

        Raises:
            UserError: when the source cannot be listed.
        """

    def read(self, path: str, at: bytes) -> bytes:
        """One file's content.

        Args:
            path: an entry's.
            at: the same entry's.

        Raises:
            ReadError: for whatever prevents it, with the reason: `NOT_THERE` where it is gone.
            UserError: when the whole source is not there.
        """

    def fingerprint(self, listing: Iterator[tuple[str, int]]) -> str:
        """SHA-256 of a zip's or table's bytes, or of a folder's listing.

        Args:
            listing: paths and sizes of all entries, ordered by path.
        """


def junk_reason(path: str) -> str | None:
    """Why a file is not a picture at all, judged by its path; None where it may be one."""
    name = path.rpartition("/")[2]
    if name.lower() in _SYSTEM_FILES or name == ".DS_Store":
        return "a file of the operating system"
    if "__MACOSX/" in path and "__MACOSX" in path.split("/"):
        return "a file of the operating system"
    if path.startswith(".") or "/." in path:
        return "a hidden file"
    return None


def check_size(size: int) -> None:
    """Refuses a file that is too large to be a crop of a face.

    Raises:
        ReadError: above `MAX_FILE_BYTES`.
    """
    if size > MAX_FILE_BYTES:
        raise ReadError(f"{size:,} bytes: larger than {MAX_FILE_BYTES:,}")


def read_error(error: Exception) -> ReadError:
    """What keeps a file from being read, `NOT_THERE` where there is none."""
    absent = isinstance(error, (FileNotFoundError, NotADirectoryError))
    return ReadError(NOT_THERE if absent else f"cannot be read: {first_line(error)}")
