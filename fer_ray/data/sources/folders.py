"""A folder of image files, on any file system that pyarrow reads."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import stat
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from fer_ray import storage
from fer_ray.data.image_source import SOURCES, SourceType
from fer_ray.data.sources import layouts
from fer_ray.data.sources.files import (
    Entry,
    ReadError,
    check_size,
    entries_of,
    read_error,
    table_of,
)
from fer_ray.errors import UserError, first_line

NOT_REGULAR = "not a regular file"

_ROWS = 8192
_Row = tuple[str, int, str | None]
"""Path, size in bytes, and the reason why the file cannot be read."""


class FolderSource:
    """The files below a folder, as a `FileSource`."""

    def __init__(self, path: str) -> None:
        self.path = path

    def entries(self) -> Iterator[Entry]:
        """See `FileSource.entries`."""
        return entries_of(self.tables())

    def tables(self) -> Iterator[pa.Table]:
        """Lists all files, folder by folder; pipes, broken links and bad names have a reason."""
        fs, root = self._filesystem
        walk = _walk_local if isinstance(fs, pafs.LocalFileSystem) else _walk
        try:
            rows = walk(fs, root)
            while batch := list(itertools.islice(rows, _ROWS)):
                paths, sizes, reasons = (list(column) for column in zip(*batch))
                nothing = [None] * len(batch)
                yield table_of([paths, sizes, [b""] * len(batch), nothing, nothing, reasons])
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"--source: {self.path} cannot be listed: {first_line(error)}"
            ) from error

    def read(self, path: str, at: bytes) -> bytes:
        """Returns the content of one file; see `FileSource.read`."""
        try:
            return read_file(*self._filesystem, path)
        except (OSError, pa.ArrowException, ValueError) as error:
            if not storage.is_directory(self.path):
                raise UserError(
                    f"--source: {self.path} no longer exists, or not on all machines"
                ) from error
            raise read_error(error) from error

    def fingerprint(self, listing: Iterator[tuple[str, int]]) -> str:
        """Returns the hash of the listing: one line per file with path, tab and size."""
        digest = hashlib.sha256()
        for path, size in listing:
            digest.update(f"{path}\t{size}\n".encode())
        return digest.hexdigest()

    @cached_property
    def _filesystem(self) -> tuple[pafs.FileSystem, str]:
        fs, root = storage.filesystem(self.path)
        return fs, root.rstrip("/")

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}


SOURCES.register("folder")(
    SourceType(
        description="a folder with <split>/<class>/<file> or <class>/<file>",
        recognizes=storage.is_directory,
        open=lambda source, options: layouts.open_layout(
            FolderSource(storage.absolute(source)), source
        ),
        open_files=FolderSource,
    )
)


def read_file(fs: pafs.FileSystem, root: str, path: str) -> bytes:
    """Returns the content of the file at `path` below the folder `root`.

    Raises:
        ReadError: when the file is too large, or is a pipe or device.
        OSError: when it cannot be read.
    """
    full = f"{root}/{path}" if root else path
    if isinstance(fs, pafs.LocalFileSystem):
        # O_NONBLOCK: opening a pipe would wait; Path.open takes more than twice the time
        descriptor = os.open(full, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            if stat.S_ISDIR(status.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if not stat.S_ISREG(status.st_mode):
                raise ReadError(NOT_REGULAR)
            check_size(status.st_size)
            return os.read(descriptor, status.st_size)
        finally:
            os.close(descriptor)
    with fs.open_input_file(full) as file:
        check_size(file.size())
        return file.read()


def _walk(fs: pafs.FileSystem, root: str) -> Iterator[_Row]:
    """Lists all files below a folder of an object store, one folder at a time."""
    folders = [root]
    while folders:
        folder = folders.pop()
        for info in fs.get_file_info(pafs.FileSelector(folder)):
            path = info.path[len(root) :].strip("/")
            if info.path.strip("/") == folder.strip("/"):  # there is a key with a double slash
                yield from _walk_nameless(fs, root, folder)
            elif info.type == pafs.FileType.Directory:
                folders.append(info.path)
            else:
                yield path, info.size or 0, None


def _walk_nameless(fs: pafs.FileSystem, root: str, folder: str) -> Iterator[_Row]:
    """Lists the files whose key has a double slash after a folder; pyarrow cannot open them.

    pyarrow lists them only in a recursive listing of the folder, which is held in memory.
    """
    for info in fs.get_file_info(pafs.FileSelector(folder, recursive=True)):
        if info.path.startswith(f"{folder}//") and info.type != pafs.FileType.Directory:
            path, reason = info.path[len(root) + 1 :], "below a folder without a name"
            yield path, info.size or 0, reason


def _walk_local(fs: pafs.FileSystem, root: str) -> Iterator[_Row]:
    """Lists all files below a local folder; pyarrow's listing silently omits broken links."""
    folders = [root or "/"]
    visited: set[tuple[int, int]] = set()  # symbolic links may form cycles
    while folders:
        folder = folders.pop()
        visited.add(_identity(Path(folder)))
        with os.scandir(folder) as items:
            for item in items:
                path = item.path[len(root) :].strip("/")
                if not _is_folder(item):
                    yield _local_row(item, path)
                elif item.is_symlink() and (
                    _points_to_parent(item.path, folder) or _identity(item) in visited
                ):
                    reason = "a link to a folder that is read already"
                    yield _as_utf8(path), 0, reason
                else:
                    folders.append(item.path)


def _is_folder(item: os.DirEntry[str]) -> bool:
    try:
        return item.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(item: os.DirEntry[str] | Path) -> tuple[int, int]:
    status = item.stat()
    return status.st_dev, status.st_ino


def _local_row(item: os.DirEntry[str], path: str) -> _Row:
    valid = _as_utf8(path)
    if valid != path:
        return valid, 0, "the file's name is not UTF-8"
    try:
        status = item.stat()
    except OSError:
        return path, 0, "a broken link"
    if not stat.S_ISREG(status.st_mode):
        return path, 0, NOT_REGULAR
    return path, status.st_size, None


def _as_utf8(path: str) -> str:
    """Escapes the bytes of a path that are not UTF-8, which Arrow refuses."""
    if path.isascii():
        return path
    return os.fsencode(path).decode(errors="backslashreplace")


def _points_to_parent(link: str, folder: str) -> bool:
    target, real = os.path.realpath(link), os.path.realpath(folder)
    return real == target or real.startswith(target.rstrip("/") + "/")
