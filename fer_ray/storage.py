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


def is_uri(place: str) -> bool:
    """Whether a place is a URI and not a local path."""
    return bool(_SCHEME.match(place))


def absolute(place: str) -> str:
    """A local path made absolute (``~`` expanded); a URI as it is, without a closing slash.

    Raises:
        UserError: for a place that cannot be one.
    """
    try:
        if "\0" in place.encode().decode():
            raise ValueError("it has a null character")
        if not is_uri(place):
            return str(Path(place).expanduser().absolute())
    except (UnicodeEncodeError, RuntimeError, ValueError) as error:
        raise UserError(f"{place!r} is no place: {error}") from error
    if not _without_query(place)[0].partition("://")[2].strip("/") and not place.startswith(
        "file:"
    ):
        raise UserError(f"{place}: names no bucket")
    return join(place)


def join(place: str, *parts: str) -> str:
    """A place below another; a URI's query (``?endpoint_override=…``) stays at its end."""
    base, query = _without_query(place)
    return "/".join([base.rstrip("/"), *parts]) + query


def name_of(place: str) -> str:
    """The last component of a place."""
    return _without_query(place)[0].rstrip("/").rsplit("/", 1)[-1]


def parent_of(place: str) -> str:
    """The place that holds another."""
    base, query = _without_query(place)
    above = base.rstrip("/").rsplit("/", 1)[0]
    return (above or "/") + query


def _without_query(place: str) -> tuple[str, str]:
    base, mark, query = place.partition("?") if is_uri(place) else (place, "", "")
    return base, mark + query


def check_name(what: str, name: str) -> str:
    """Returns `name` if it is a plain name (one path component), else raises `UserError`."""
    if not _PLAIN_NAME.match(name):
        raise UserError(
            f"{what}: {name!r} is not a plain name: letters, digits and . _ = + - only, "
            "a letter or digit first"
        )
    return name


def filesystem(place: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a place and the path within it.

    Raises:
        UserError: for a URI whose scheme pyarrow does not know.
    """
    place = absolute(place)
    if not is_uri(place):
        return pafs.LocalFileSystem(), place
    try:
        return pafs.FileSystem.from_uri(place)
    except (ValueError, OSError) as error:
        raise UserError(f"{place}: {error}".splitlines()[0]) from error


def check_bucket(flag: str, place: str) -> None:
    """Refuses an output in a bucket that is not there, before any work; local places pass.

    Raises:
        UserError: where there is no such bucket, or no access to it.
    """
    if not is_uri(place):
        return
    fs, path = filesystem(place)
    bucket = path.split("/")[0]
    try:
        if fs.get_file_info(path).type == pafs.FileType.NotFound and fs.type_name in _BUCKETS:
            with contextlib.suppress(OSError):  # who may use a folder may not ask for the bucket
                if fs.get_file_info(bucket).type == pafs.FileType.NotFound:
                    raise UserError(f"{flag}: {place}: there is no bucket {bucket!r}")
    except OSError as error:
        if is_refusal(error):
            raise UserError(f"{flag}: {place}: no access: {error}".splitlines()[0]) from error
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


def exists(place: str) -> bool:
    """Whether a file or folder is there."""
    fs, path = filesystem(place)
    return fs.get_file_info(path).type != pafs.FileType.NotFound


def is_directory(place: str) -> bool:
    """Whether a folder is there."""
    fs, path = filesystem(place)
    return fs.get_file_info(path).type == pafs.FileType.Directory


def list_names(place: str) -> list[str]:
    """The sorted names directly below a folder; none where there is no such folder."""
    fs, path = filesystem(place)
    infos = fs.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    return sorted(info.base_name for info in infos)


def make_directory(place: str) -> None:
    """Creates a folder and those above it."""
    fs, path = filesystem(place)
    fs.create_dir(path, recursive=True)


def read_bytes(place: str) -> bytes:
    """A file's content."""
    fs, path = filesystem(place)
    with fs.open_input_stream(path) as stream:
        return stream.read()


def write_bytes(place: str, content: bytes) -> None:
    """Writes a file whole: on a local file system under another name first, then moved."""
    fs, path = filesystem(place)
    fs.create_dir(parent_of(path), recursive=True)
    target = f"{path}.{uuid.uuid4().hex[:8]}.tmp" if _is_local(fs) else path
    with fs.open_output_stream(target) as stream:
        stream.write(content)
    if target != path:
        fs.move(target, path)


def read_json(place: str) -> Any:
    """A JSON file's value."""
    return json.loads(read_bytes(place))


def write_json(place: str, value: Any) -> None:
    """Writes a value as indented JSON; not-a-number is refused, so that every reader copes."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes(place, f"{text}\n".encode())


def remove(place: str) -> None:
    """Removes a file or folder, if it is there."""
    fs, path = filesystem(place)
    kind = fs.get_file_info(path).type
    if kind == pafs.FileType.Directory:
        fs.delete_dir(path)
    elif kind == pafs.FileType.File:
        fs.delete_file(path)


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


def is_unfinished(place: str) -> bool:
    """Whether a folder in an object store was never written to its end."""
    return is_uri(place) and exists(join(place, _UNFINISHED))


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
