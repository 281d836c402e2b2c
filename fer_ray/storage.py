"""Files on any file system that pyarrow reads: local paths and URIs alike.

Jobs name places as strings: a local path, absolute or relative to the working directory, or a
URI such as ``s3://bucket/folder``. Workers run in another working directory, so a place is
made absolute once, by the job, with `absolute`.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import glob
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from fer_ray.errors import UserError

_SCHEME = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]+://")
_PLAIN_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._=+-]*$")


def is_uri(path: str) -> bool:
    """Whether a place is a URI and not a local path."""
    return bool(_SCHEME.match(path))


def absolute(path: str) -> str:
    """A local path made absolute (``~`` expanded); a URI as it is, without a closing slash.

    Raises:
        UserError: for a place that cannot be one.
    """
    try:
        if "\0" in path.encode().decode():
            raise ValueError("it has a null character")
        if not is_uri(path):
            return str(Path(path).expanduser().absolute())
    except (UnicodeEncodeError, RuntimeError, ValueError) as error:
        raise UserError(f"{path!r} is no place: {error}") from error
    if not _without_query(path)[0].partition("://")[2].strip("/") and not path.startswith("file:"):
        raise UserError(f"{path}: names no bucket")
    return join(path)


def join(path: str, *parts: str) -> str:
    """A place below another; a URI's query (``?endpoint_override=…``) stays at its end."""
    base, query = _without_query(path)
    return "/".join([base.rstrip("/"), *parts]) + query


def name_of(path: str) -> str:
    """The last component of a place."""
    return _without_query(path)[0].rstrip("/").rsplit("/", 1)[-1]


def parent_of(path: str) -> str:
    """The place that holds another."""
    base, query = _without_query(path)
    above = base.rstrip("/").rsplit("/", 1)[0]
    return (above or "/") + query


def _without_query(path: str) -> tuple[str, str]:
    base, mark, query = path.partition("?") if is_uri(path) else (path, "", "")
    return base, mark + query


def check_name(what: str, name: str) -> str:
    """Returns `name` if it is a plain name (one path component), else raises `UserError`."""
    if not _PLAIN_NAME.match(name):
        raise UserError(
            f"{what}: {name!r} is not a plain name: letters, digits and . _ = + - only, "
            "a letter or digit first"
        )
    return name


def filesystem(path: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a place and the path within it.

    Raises:
        UserError: for a URI whose scheme pyarrow does not know.
    """
    path = absolute(path)
    if not is_uri(path):
        return pafs.LocalFileSystem(), path
    try:
        return pafs.FileSystem.from_uri(path)
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: {error}".splitlines()[0]) from error


def check_bucket(flag: str, path: str) -> None:
    """Refuses an output in a bucket that is not there, before any work; local places pass.

    Raises:
        UserError: where there is no such bucket, or no access to it.
    """
    if not is_uri(path):
        return
    fs, inner = filesystem(path)
    bucket = inner.split("/")[0]
    try:
        if fs.get_file_info(inner).type == pafs.FileType.NotFound and fs.type_name in _BUCKETS:
            with contextlib.suppress(OSError):  # who may use a folder may not ask for the bucket
                if fs.get_file_info(bucket).type == pafs.FileType.NotFound:
                    raise UserError(f"{flag}: {path}: there is no bucket {bucket!r}")
    except OSError as error:
        if is_refusal(error):
            raise UserError(f"{flag}: {path}: no access: {error}".splitlines()[0]) from error
        raise


_BUCKETS = ("s3", "gcs", "abfs")
"""File systems whose first component has to be there before anything is written."""

_REFUSALS = re.compile(
    "ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_ACCESS_KEY_ID|INVALID_CLIENT_TOKEN_ID|EXPIRED_TOKEN|"
    "SIGNATURE_DOES_NOT_MATCH|UNRECOGNIZED_CLIENT|PERMISSION_DENIED|UNAUTHENTICATED"
)


def is_refusal(error: OSError) -> bool:
    """Whether an object store said no: a mistake in the place or the credentials, not a failure."""
    return bool(_REFUSALS.search(str(error)))


def exists(path: str) -> bool:
    """Whether a file or folder is there."""
    fs, inner = filesystem(path)
    return fs.get_file_info(inner).type != pafs.FileType.NotFound


def is_directory(path: str) -> bool:
    """Whether a folder is there."""
    fs, inner = filesystem(path)
    return fs.get_file_info(inner).type == pafs.FileType.Directory


def list_names(path: str) -> list[str]:
    """The sorted names directly below a folder; none where there is no such folder."""
    fs, inner = filesystem(path)
    infos = fs.get_file_info(pafs.FileSelector(inner, allow_not_found=True))
    return sorted(info.base_name for info in infos)


def make_directory(path: str) -> None:
    """Creates a folder and those above it."""
    fs, inner = filesystem(path)
    fs.create_dir(inner, recursive=True)


def read_bytes(path: str) -> bytes:
    """A file's content."""
    fs, inner = filesystem(path)
    with fs.open_input_stream(inner) as stream:
        return stream.read()


def write_bytes(path: str, content: bytes) -> None:
    """Writes a file whole: on a local file system under another name first, then moved."""
    fs, inner = filesystem(path)
    fs.create_dir(parent_of(inner), recursive=True)
    target = f"{inner}.{uuid.uuid4().hex[:8]}.tmp" if _is_local(fs) else inner
    with fs.open_output_stream(target) as stream:
        stream.write(content)
    if target != inner:
        fs.move(target, inner)


def read_json(path: str) -> Any:
    """A JSON file's value."""
    return json.loads(read_bytes(path))


def write_json(path: str, value: Any) -> None:
    """Writes a value as indented JSON; not-a-number is refused, so that every reader copes."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes(path, f"{text}\n".encode())


def remove(path: str) -> None:
    """Removes a file or folder, if it is there."""
    fs, inner = filesystem(path)
    kind = fs.get_file_info(inner).type
    if kind == pafs.FileType.Directory:
        fs.delete_dir(inner)
    elif kind == pafs.FileType.File:
        fs.delete_file(inner)


@contextlib.contextmanager
def staged_directory(destination: str, *, staging: str | None = None) -> Iterator[str]:
    """A folder to write into that becomes `destination` when the block ends well.

    On a local file system the folder lies beside the destination (or in `staging`, which has to
    be on the same file system) and takes its place in one step: a reader sees the old one or the
    new one. What a killed process left there is removed by the next. An object store cannot
    rename: there the destination is emptied and written directly, `is_unfinished` until the
    block ends, and it is the caller's part to write last the file that makes readers trust the
    folder. When the block fails, what was written is removed.

    Args:
        destination: local path or URI of the folder.
        staging: local folder for the unfinished one; the destination's parent by default.

    Yields:
        The place to write into; it exists and is empty.
    """
    destination = absolute(destination)
    if is_uri(destination):
        if not is_directory(destination):
            remove(destination)
        # the mark is there from the first removal to the last: what a killed process leaves may
        # be replaced
        mark = join(destination, _UNFINISHED)
        write_bytes(mark, b"being written, or broken off while it was\n")
        _empty(destination)
        try:
            yield destination
        except BaseException:
            _empty(destination)
            remove(destination)
            raise
        remove(mark)
        return
    target = Path(os.path.realpath(destination))  # a link stays, and leads to the new folder
    replaces = target.exists()
    parent = Path(absolute(staging)) if staging else target.parent
    with claimed_directory(parent, f".{target.name}.unfinished-") as unfinished:
        yield str(unfinished)
        target.parent.mkdir(parents=True, exist_ok=True)
        if replaces and target.exists():
            _exchange(unfinished, target)  # the old one is removed with the claim
            return
        try:
            unfinished.rename(target)
        except OSError as error:
            if not target.exists():
                raise
            raise UserError(
                f"{target} was made by another meanwhile: it is not replaced"
            ) from error


_UNFINISHED = "_unfinished"


def _empty(folder: str) -> None:
    """Removes all that a folder holds but the mark, first the files that readers trust it for."""
    fs, path = filesystem(folder)
    found = fs.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    for info in sorted(found, key=lambda one: one.type == pafs.FileType.Directory):
        # a key with a doubled slash is listed as the folder itself
        if info.path.strip("/") != path.strip("/") and info.base_name != _UNFINISHED:
            remove(join(folder, info.base_name))


def is_unfinished(path: str) -> bool:
    """Whether a folder in an object store was never written to its end."""
    return is_uri(path) and exists(join(path, _UNFINISHED))


@contextlib.contextmanager
def claimed_directory(parent: Path, prefix: str) -> Iterator[Path]:
    """A new local folder that is removed at the end, at the latest by the next claim like it.

    A lock says that its process lives; the kernel takes it away from a killed one.

    Args:
        parent: where to make it; made where it is not there.
        prefix: how the folder's name begins: the names of this use, and of no other.

    Yields:
        The folder; it is empty, and may be moved away.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob(f"{glob.escape(prefix)}*"):
        with contextlib.suppress(OSError), _locked(left):
            shutil.rmtree(left, ignore_errors=True)
    token = uuid.uuid4().hex[:8]
    made = parent / f".claim-{token}"  # until it is locked it must not be taken for a left one
    made.mkdir()
    folder = parent / f"{prefix}{token}"
    with _locked(made):
        try:
            made.rename(folder)
            yield folder
        finally:
            shutil.rmtree(made, ignore_errors=True)
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds a folder's lock; raises `BlockingIOError` where another process does."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


_AT_WORKING_DIRECTORY, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def _exchange(new: Path, target: Path) -> None:
    """Lets two folders change places, in one step where the file system can (Linux 3.15)."""
    libc = ctypes.CDLL(None)
    names = (os.fsencode(new), os.fsencode(target))
    here = _AT_WORKING_DIRECTORY
    if libc.renameat2(here, names[0], here, names[1], _RENAME_EXCHANGE) == 0:
        return
    old = new.with_name(f"{new.name}.old")  # the same prefix: removed by the next, if not here
    target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _is_local(fs: pafs.FileSystem) -> bool:
    return isinstance(fs, pafs.LocalFileSystem)
