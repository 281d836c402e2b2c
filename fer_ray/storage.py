"""Files on every file system that pyarrow reads, local or remote.

A path is a string: a local path, absolute or relative to the working directory, or a URI such as
``s3://bucket/folder``. Workers run in another working directory; the job therefore makes each path
absolute once, with `absolute`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
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

from fer_ray.errors import UserError, first_line

MAX_JSON_BYTES = 256 * 2**20
"""Largest JSON file that is read: the description of some millions of files."""

_SCHEME = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]+://")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]*")


def is_uri(path: str) -> bool:
    """Whether a path is a URI and not a local path."""
    return bool(_SCHEME.match(path))


def absolute(path: str) -> str:
    """Makes a local path absolute and expands ``~``; of a URI, removes the slash at its end.

    Raises:
        UserError: for a path that is not valid.
    """
    try:
        if "\0" in path.encode().decode():
            raise ValueError("it has a null character")
        if not is_uri(path):
            return str(Path(path).expanduser().absolute())
    except (UnicodeEncodeError, RuntimeError, ValueError) as error:
        raise UserError(f"{path!r} is not a valid path: {error}") from error
    if not _without_query(path)[0].partition("://")[2].strip("/") and not path.startswith("file:"):
        raise UserError(f"{path}: names no bucket")
    return join(path)


def join(path: str, *parts: str) -> str:
    """Joins path components; a URI's query (``?endpoint_override=…``) stays at its end."""
    base, query = _without_query(path)
    return "/".join([base.rstrip("/"), *parts]) + query


def name_of(path: str) -> str:
    """The last component of a path."""
    return _without_query(path)[0].rstrip("/").rsplit("/", 1)[-1]


def parent_of(path: str) -> str:
    """The folder that contains a path."""
    base, query = _without_query(path)
    above = base.rstrip("/").rsplit("/", 1)[0]
    return (above or "/") + query


def _without_query(path: str) -> tuple[str, str]:
    base, mark, query = path.partition("?") if is_uri(path) else (path, "", "")
    return base, mark + query


def is_plain_name(name: str) -> bool:
    """Whether a name is one path component of harmless characters."""
    return bool(_PLAIN_NAME.fullmatch(name))


def check_name(what: str, name: str) -> str:
    """Returns `name` if it is a plain name (one path component), else raises `UserError`."""
    if not is_plain_name(name):
        raise UserError(
            f"{what}: {name!r} is not a plain name: letters, digits and . _ = + - only, "
            "a letter or digit first"
        )
    return name


def filesystem(path: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a path, and the path within it.

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
    """Refuses an output in a bucket that does not exist, before any work; accepts local paths.

    Raises:
        UserError: where the bucket does not exist, or access is denied.
    """
    if not is_uri(path):
        return
    fs, inner = filesystem(path)
    bucket = inner.split("/")[0]
    try:
        if fs.get_file_info(inner).type == pafs.FileType.NotFound and fs.type_name in _BUCKETS:
            with contextlib.suppress(OSError):  # some may use a folder but not list its bucket
                if fs.get_file_info(bucket).type == pafs.FileType.NotFound:
                    raise UserError(f"{flag}: {path}: there is no bucket {bucket!r}")
    except OSError as error:
        if is_refusal(error):
            raise UserError(f"{flag}: {path}: no access: {error}".splitlines()[0]) from error
        raise


_BUCKETS = ("s3", "gcs", "abfs")
"""File systems whose bucket, the first component, has to exist before anything is written."""

_REFUSALS = re.compile(
    "ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_ACCESS_KEY_ID|INVALID_CLIENT_TOKEN_ID|EXPIRED_TOKEN|"
    "SIGNATURE_DOES_NOT_MATCH|UNRECOGNIZED_CLIENT|PERMISSION_DENIED|UNAUTHENTICATED"
)


def is_refusal(error: OSError) -> bool:
    """Whether an object store refused access: the path or the credentials are wrong.

    pyarrow gives the store's error code in its message only.
    """
    return bool(_REFUSALS.search(str(error)))


def exists(path: str) -> bool:
    """Whether a file or folder exists."""
    fs, inner = filesystem(path)
    return fs.get_file_info(inner).type != pafs.FileType.NotFound


def is_directory(path: str) -> bool:
    """Whether a folder exists."""
    fs, inner = filesystem(path)
    return fs.get_file_info(inner).type == pafs.FileType.Directory


def list_names(path: str) -> list[str]:
    """The sorted names directly below a folder; empty where the folder does not exist."""
    fs, inner = filesystem(path)
    infos = fs.get_file_info(pafs.FileSelector(inner, allow_not_found=True))
    return sorted(info.base_name for info in infos)


def make_directory(path: str) -> None:
    """Creates a folder and those above it."""
    fs, inner = filesystem(path)
    fs.create_dir(inner, recursive=True)


def file_size(path: str) -> int:
    """Size of a regular file in bytes.

    Raises:
        FileNotFoundError: where there is none.
        UserError: for a folder, and for a pipe or a device, which could block a reader for ever.
    """
    fs, inner = filesystem(path)
    info = fs.get_file_info(inner)
    if info.type == pafs.FileType.NotFound:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    if info.type != pafs.FileType.File:
        what = "a folder" if info.type == pafs.FileType.Directory else "a pipe or a device"
        raise UserError(f"{path} is {what}, not a file")
    return info.size


def read_bytes(path: str, *, limit: int | None = None) -> bytes:
    """A file's content.

    Args:
        path: local path or URI.
        limit: the largest size in bytes; a larger file is not read.

    Raises:
        FileNotFoundError: where there is no file.
        UserError: for what is no regular file, or larger than `limit`.
    """
    size = file_size(path)
    if limit is not None and size > limit:
        raise UserError(f"{path} has {size:,} bytes; at most {limit:,} are read")
    fs, inner = filesystem(path)
    with fs.open_input_stream(inner) as stream:
        return stream.read(limit)


def write_bytes(path: str, content: bytes) -> None:
    """Writes a file; on a local file system readers see the old or the new one, never half."""
    fs, inner = filesystem(path)
    fs.create_dir(parent_of(inner), recursive=True)
    target = f"{inner}.{uuid.uuid4().hex[:8]}.tmp" if _is_local(fs) else inner
    with fs.open_output_stream(target, compression=None) as stream:
        stream.write(content)
    if target != inner:
        fs.move(target, inner)


def read_json(path: str) -> dict[str, Any]:
    """The JSON object of a file.

    Raises:
        FileNotFoundError: where there is no file.
        UserError: where it is not JSON (which has neither NaN nor lone surrogates), nested too
            deep, too large, or not an object.
    """
    content = read_bytes(path, limit=MAX_JSON_BYTES)
    try:
        value = json.loads(content)
        # Python also reads NaN, infinity and lone surrogates, but cannot write them here
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except RecursionError as error:
        raise UserError(f"{path} is damaged: its JSON is nested too deep") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: not valid JSON: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: not a JSON object but a {type(value).__name__}")
    return value


def write_json(path: str, value: Any) -> None:
    """Writes a value as indented JSON; NaN and infinity are refused, since JSON has none."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes(path, f"{text}\n".encode())


def remove(path: str) -> None:
    """Removes a file or folder, if it exists; of a link to a folder, only the link."""
    fs, inner = filesystem(path)
    kind = fs.get_file_info(inner).type
    if kind == pafs.FileType.Directory:
        fs.delete_dir(inner)
    elif kind == pafs.FileType.File:
        fs.delete_file(inner)


@contextlib.contextmanager
def _marked_as_unfinished(destination: str) -> Iterator[None]:
    """Empties a folder of an object store, and marks it as unfinished until the block ends."""
    if not is_directory(destination):
        remove(destination)
    # the mark exists from the first removal to the last write: what a killed process leaves
    # may be replaced
    mark = join(destination, _UNFINISHED)
    write_bytes(mark, b"being written, or left by an interrupted process\n")
    _empty(destination)
    try:
        yield
    except BaseException:
        _empty(destination)
        remove(destination)
        raise
    remove(mark)


@contextlib.contextmanager
def staged_directory(destination: str, *, staging: str | None = None) -> Iterator[str]:
    """Yields a folder to write into, which replaces `destination` when the block succeeds.

    On a local file system the folder lies beside the destination (or in `staging`, which has to
    be on the same file system) and replaces it in one step: a reader sees the old folder or the
    new one. The next call removes what a killed process left there. An object store cannot rename:
    there the destination is emptied and written directly, and `is_unfinished` until the block ends;
    the caller writes the file that marks the folder as complete last. When the block fails, what
    was written is removed.

    Args:
        destination: local path or URI of the folder.
        staging: local folder for the unfinished one; the destination's parent by default.

    Yields:
        The folder to write into; it exists and is empty.
    """
    destination = absolute(destination)
    if is_uri(destination):
        with _marked_as_unfinished(destination):
            yield destination
        return
    target = Path(os.path.realpath(destination))  # a link is kept and points to the new folder
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
                f"{target} was created by another process meanwhile and is not replaced"
            ) from error


_UNFINISHED = "_unfinished"


def _empty(folder: str) -> None:
    """Removes a folder's content except the mark; first files, which mark it as complete."""
    fs, path = filesystem(folder)
    infos = fs.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    for info in sorted(infos, key=lambda entry: entry.type == pafs.FileType.Directory):
        # a key with a doubled slash is listed as the folder itself
        if info.path.strip("/") != path.strip("/") and info.base_name != _UNFINISHED:
            remove(join(folder, info.base_name))


def is_unfinished(path: str) -> bool:
    """Whether writing a folder in an object store was interrupted, or goes on."""
    return is_uri(path) and exists(join(path, _UNFINISHED))


@contextlib.contextmanager
def claimed_directory(parent: Path, prefix: str) -> Iterator[Path]:
    """Yields a new local folder and removes it at the end.

    Where the process is killed, the next call with the same prefix removes the folder: a lock
    shows that a process lives, and the kernel releases the lock of a killed one.

    Args:
        parent: the folder to create it in; created where it does not exist.
        prefix: how the folder's name begins; used for nothing else in `parent`.

    Yields:
        The folder; it is empty, and may be moved.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for abandoned in parent.glob(f"{glob.escape(prefix)}*"):
        with contextlib.suppress(OSError), _locked(abandoned):
            shutil.rmtree(abandoned, ignore_errors=True)
    token = uuid.uuid4().hex[:8]
    unlocked = parent / f".claim-{token}"  # under its own name it would seem abandoned
    unlocked.mkdir()
    folder = parent / f"{prefix}{token}"
    with _locked(unlocked):
        try:
            unlocked.rename(folder)
            yield folder
        finally:
            shutil.rmtree(unlocked, ignore_errors=True)
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds a folder's lock; raises `BlockingIOError` where another process holds it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


_AT_WORKING_DIRECTORY, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def _exchange(new: Path, target: Path) -> None:
    """Exchanges two folders, in one step where the file system can (Linux 3.15)."""
    libc = ctypes.CDLL(None)
    names = (os.fsencode(new), os.fsencode(target))
    here = _AT_WORKING_DIRECTORY
    if libc.renameat2(here, names[0], here, names[1], _RENAME_EXCHANGE) == 0:
        return
    old = new.with_name(
        f"{new.name}.old"
    )  # the same prefix: the next call removes it, if not this one
    target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _is_local(fs: pafs.FileSystem) -> bool:
    return isinstance(fs, pafs.LocalFileSystem)
