"""A zip of image files, read in place: it is never unpacked and never held in memory.

Python's `zipfile` keeps half a kilobyte for each entry in every process that opens the zip. Here
the driver reads the zip's central directory once, in blocks, and each entry carries the location
of its bytes, so that workers read nothing else. The format is PKWARE's APPNOTE 6.3.10.
"""

from __future__ import annotations

import bz2
import io
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fer_ray import storage
from fer_ray.data.image_source import SOURCES, SourceType
from fer_ray.data.sources import layouts
from fer_ray.data.sources.files import (
    ENTRIES,
    Entry,
    ReadError,
    check_size,
    entries_of,
    hash_file,
    tables_of,
)
from fer_ray.errors import UserError, first_line

# The records of a zip with their signatures; names as in APPNOTE, sections 4.3.7 to 4.3.16.
_END = struct.Struct("<4s4H2LH")
_END_SIGNATURE = b"PK\x05\x06"
_LOCATOR64 = struct.Struct("<4sLQL")
_LOCATOR64_SIGNATURE = b"PK\x06\x07"
_END64 = struct.Struct("<4sQ2H2L4Q")
_END64_SIGNATURE = b"PK\x06\x06"
_HEADER = struct.Struct("<4s6H3L5H2L")
_HEADER_FIELDS = np.dtype(
    {
        "names": ["flags", "method", "crc", "compressed", "size", "name", "offset"],
        "formats": ["<u2", "<u2", "<u4", "<u4", "<u4", "<u2", "<u4"],
        "offsets": [8, 10, 16, 20, 24, 28, 42],
        "itemsize": _HEADER.size,
    }
)
"""The fields of `_HEADER` that are needed of every entry."""
_HEADER_LENGTHS = struct.Struct("<4s24x3H")
"""The beginning of `_HEADER`: signature, and the lengths of name, extra field and comment."""
_HEADER_SIGNATURE = b"PK\x01\x02"
_LOCAL = struct.Struct("<4s5H3L2H")
_LOCAL_SIGNATURE = b"PK\x03\x04"
_MAX_COMMENT = 2**16 - 1
_ENCRYPTED, _UTF8 = 0x1, 0x800
"""Bits of the general purpose flag."""
_STORED, _DEFLATED, _BZIP2 = 0, 8, 12
_METHODS = (_STORED, _DEFLATED, _BZIP2)
"""Compression methods."""
_ZIP64_EXTRA = 1
"""Header id of the extra field with 64-bit numbers."""
_IN_ZIP64_EXTRA = 2**32 - 1
"""Instead of a number: it is in the zip64 extra field."""

_AT = struct.Struct("<QQQLH")
"""An entry's `at`: offset of its local header, compressed size, size, CRC-32, method."""
_AT_FIELDS = np.dtype("<u8,<u8,<u8,<u4,<u2")
"""`_AT` as a type of numpy."""

_PLAIN = r"^([^./\\\x00][^/\\\x00]*/)*[^./\\\x00][^/\\\x00]*$"
"""A path whose components are not empty and do not begin with a dot; for RE2."""

_BLOCK = 2**19
_SLACK = 128
"""Bytes read in addition to an entry: its local header may have a longer extra field."""


class _DamagedError(Exception):
    """Why the zip as a whole cannot be read."""


@dataclass(frozen=True, kw_only=True)
class _Directory:
    """Where the central directory of a zip is."""

    offset: int
    """Position in the file, in bytes."""
    size: int
    """Size in bytes."""
    count: int
    """Number of entries, as declared at the end of the zip."""
    shift: int
    """Number of bytes before the zip itself, as in a self-extracting archive."""


class ZipSource:
    """The files of a zip, as a `FileSource`."""

    def __init__(self, path: str) -> None:
        self.path = path

    def entries(self) -> Iterator[Entry]:
        """See `FileSource.entries`."""
        return entries_of(self.tables())

    def tables(self) -> Iterator[pa.Table]:
        """Lists all files, in the order of the central directory."""
        try:
            directory = _find_directory(self._file)
            count = 0
            for block, starts in _headers(self._file, directory):
                count += len(starts)
                yield _table(block, starts, directory.shift)
            if (count ^ directory.count) & 0xFFFF:  # without zip64, only 16 bits are stored
                raise _DamagedError(
                    f"it declares {directory.count:,} entries and has {count:,} of them"
                )
        except (OSError, pa.ArrowException, _DamagedError, struct.error) as error:
            raise _not_readable(self.path, error) from error

    def read(self, path: str, at: bytes) -> bytes:
        """Returns the content of one file; see `FileSource.read`."""
        offset, compressed_size, size, crc, method = _AT.unpack(at)
        check_size(size)
        check_size(compressed_size - 1024)  # incompressible data may grow by a few bytes
        try:
            compressed = self._read_compressed(path, offset, compressed_size)
            content = _decompress(compressed, method, size)
        except (OSError, pa.ArrowException, zlib.error, ValueError, OverflowError) as error:
            raise ReadError(f"cannot be unpacked: {first_line(error)}") from error
        if len(content) != size or zlib.crc32(content) != crc:
            raise ReadError("cannot be unpacked: size or checksum are not those in the zip")
        return content

    def _read_compressed(self, path: str, offset: int, size: int) -> bytes:
        """Returns an entry's compressed bytes; nearly always with a single read."""
        block = self._read_at(_LOCAL.size + len(path.encode()) + _SLACK + size, offset)
        if len(block) < _LOCAL.size or block[:4] != _LOCAL_SIGNATURE:
            raise ReadError("cannot be unpacked: the zip has no such entry at this position")
        *_, name, extra = _LOCAL.unpack_from(block)
        start = _LOCAL.size + name + extra
        if len(block) < start + size:
            block, start = self._read_at(size, offset + start), 0
        if len(block) < start + size:
            raise ReadError("cannot be unpacked: the zip is truncated within this entry")
        return block[start : start + size]

    def fingerprint(self, listing: Iterator[tuple[str, int]]) -> str:
        """Returns the hash of the zip's bytes."""
        return hash_file(self.path)

    @cached_property
    def _read_at(self) -> Callable[[int, int], bytes]:
        """A function that reads `length` bytes at `offset`."""
        if storage.is_uri(self.path):
            return self._file.read_at
        descriptor = self._local.fileno()  # pread takes a third of the time of pyarrow's read_at
        return lambda length, offset: os.pread(descriptor, length, offset)

    @cached_property
    def _local(self) -> io.FileIO:
        try:
            return io.FileIO(self.path)
        except OSError as error:
            raise _not_readable(self.path, error) from error

    @cached_property
    def _file(self) -> pa.NativeFile:
        fs, path = storage.filesystem(self.path)
        try:
            return fs.open_input_file(path)
        except (OSError, pa.ArrowException) as error:
            raise _not_readable(self.path, error) from error

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}


SOURCES.register("zip")(
    SourceType(
        description="a .zip with such folders",
        recognizes=lambda source: (
            storage.name_of(source).lower().endswith(".zip") and storage.exists(source)
        ),
        open=lambda source, options: layouts.open_layout(
            ZipSource(storage.absolute(source)), source
        ),
        open_files=ZipSource,
    )
)


def _not_readable(path: str, error: Exception) -> UserError:
    return UserError(f"--source: {path} is not a readable zip: {first_line(error)}")


def _find_directory(file: pa.NativeFile) -> _Directory:
    """Finds the central directory from the record at the zip's end and, if any, the zip64 one."""
    size = file.size()
    tail_at = max(size - _END.size - _MAX_COMMENT, 0)
    tail = file.read_at(size - tail_at, tail_at)
    position = _find_end(tail)
    _, disk, _, _, count, length, offset, _ = _END.unpack_from(tail, position)
    end = tail_at + position
    locator_at = end - _LOCATOR64.size
    if locator_at >= 0:
        signature, _, end64, _ = _LOCATOR64.unpack(file.read_at(_LOCATOR64.size, locator_at))
        if signature == _LOCATOR64_SIGNATURE:
            end, count, length, offset = _read_end64(file, locator_at, end64)
            disk = 0
    if disk:
        raise _DamagedError("it is one of several volumes")
    shift = end - length - offset
    if length > end or shift < 0:
        raise _DamagedError("its directory lies outside the file")
    return _Directory(offset=offset + shift, size=length, count=count, shift=shift)


def _find_end(tail: bytes) -> int:
    """Returns where the end record begins: one whose comment ends the file, else the last one."""
    positions = [match.start() for match in re.finditer(re.escape(_END_SIGNATURE), tail)]
    positions = [position for position in positions if len(tail) - position >= _END.size]
    if not positions:
        raise _DamagedError("it has no directory at its end: truncated, or not a zip")
    for position in positions:
        if position + _END.size + _END.unpack_from(tail, position)[-1] == len(tail):
            return position
    return positions[-1]


def _read_end64(file: pa.NativeFile, locator_at: int, declared: int) -> tuple[int, int, int, int]:
    """Returns the position of the zip64 end record; count, size and offset of the directory."""
    nearest = locator_at - _END64.size
    # bytes before the zip shift the record from its declared position
    for position in (nearest, declared):
        # the declared position may be beyond the file, and beyond what a file system accepts
        block = file.read_at(_END64.size, position) if 0 <= position <= nearest else b""
        if block.startswith(_END64_SIGNATURE):
            *_, count, length, offset = _END64.unpack(block)
            return position, count, length, offset
    raise _DamagedError("its 64-bit directory is not at the declared position")


def _headers(file: pa.NativeFile, directory: _Directory) -> Iterator[tuple[bytes, list[int]]]:
    """Yields blocks of the central directory, and where in each block a whole header begins.

    A header has its variable fields behind it.
    """
    position, end, rest = directory.offset, directory.offset + directory.size, b""
    while position < end or rest:
        block = file.read_at(min(_BLOCK, end - position), position) if position < end else b""
        if not block:
            raise _DamagedError("its directory is truncated")
        position += len(block)
        block = rest + block
        starts, start = [], 0
        while len(block) - start >= _HEADER.size:
            signature, *lengths = _HEADER_LENGTHS.unpack_from(block, start)
            if signature != _HEADER_SIGNATURE:
                raise _DamagedError("its directory is damaged")
            following = start + _HEADER.size + sum(lengths)
            if following > len(block):
                break
            starts.append(start)
            start = following
        rest = block[start:]
        yield block, starts


def _table(block: bytes, starts: list[int], shift: int) -> pa.Table:
    """Converts headers to a table with the columns of `ENTRIES`; leaves out folders.

    Nearly all headers are ordinary ones, whose fields are converted in columns: with a million
    entries, the time for `_entry` adds up.
    """
    if not starts:
        return ENTRIES.empty_table()
    windows = np.lib.stride_tricks.sliding_window_view(np.frombuffer(block, np.uint8), _HEADER.size)
    headers = windows[starts].view(_HEADER_FIELDS)[:, 0]
    begins = [start + _HEADER.size for start in starts]
    names = [block[i : i + n] for i, n in zip(begins, headers["name"].tolist())]
    paths = pa.array([name if name.isascii() else b"" for name in names], pa.string())
    is_ordinary = pc.match_substring_regex(paths, _PLAIN).to_numpy(zero_copy_only=False)
    is_ordinary &= (headers["flags"] & _ENCRYPTED == 0) & np.isin(headers["method"], _METHODS)
    for name in ("compressed", "size", "offset"):
        is_ordinary &= headers[name] != _IN_ZIP64_EXTRA
    ordinary, others = np.flatnonzero(is_ordinary), np.flatnonzero(~is_ordinary)
    table = _ordinary_entries(paths.take(pa.array(ordinary)), headers[ordinary], shift)
    if not len(others):
        return table
    ends = [*starts[1:], len(block)]
    entries = {i: _entry(block[starts[i] : ends[i]], shift) for i in others.tolist()}
    kept = {index: entry for index, entry in entries.items() if entry}
    order = np.argsort(np.concatenate([ordinary, np.array(list(kept), np.int64)]))
    return pa.concat_tables([table, *tables_of(kept.values())]).take(pa.array(order))


def _ordinary_entries(paths: pa.Array, headers: np.ndarray, shift: int) -> pa.Table:
    """Returns a table of entries that `_entry` would give these paths and no `reason`."""
    count = len(headers)
    at = np.empty(count, _AT_FIELDS)
    at["f0"] = headers["offset"] + np.uint64(shift)
    for field, name in (("f1", "compressed"), ("f2", "size"), ("f3", "crc"), ("f4", "method")):
        at[field] = headers[name]
    offsets = np.arange(count + 1, dtype=np.int32) * _AT.size
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(at)]
    columns = {
        "path": paths,
        "size": pa.array(headers["size"], pa.int64()),
        "at": pa.Array.from_buffers(pa.binary(), count, buffers),
    }
    nothing = pa.nulls(count, pa.string())
    return pa.table([columns.get(name, nothing) for name in ENTRIES.names], schema=ENTRIES)


def _entry(header: bytes, shift: int) -> Entry | None:
    """Converts a header to an entry; returns None for a folder."""
    fields = _HEADER.unpack_from(header)
    flags, method, crc, compressed_size, size = (fields[i] for i in (3, 4, 7, 8, 9))
    offset, name_length, extra_length = fields[16], fields[10], fields[11]
    name_end = _HEADER.size + name_length
    raw = header[_HEADER.size : name_end]
    try:
        name = raw.decode()  # whatever the flag says: some programs forget to set it
    except UnicodeDecodeError:
        name = raw.decode("utf-8", "backslashreplace") if flags & _UTF8 else raw.decode("cp437")
    path, is_outside = _normalize(name)
    if path is None:
        folder = name.replace("\\", "/").strip("/")
        return Entry(path=folder, reason="a folder with content") if size else None
    if _IN_ZIP64_EXTRA in (compressed_size, size, offset):
        extra = header[name_end : name_end + extra_length]
        size, compressed_size, offset = _read_zip64(extra, size, compressed_size, offset)
    at, reason = b"", None
    if max(offset + shift, compressed_size, size) >= 2**63:
        reason, size = "it lies beyond the end of the zip", min(size, 2**63 - 1)
    else:
        at = _AT.pack(offset + shift, compressed_size, size, crc, method)
    if is_outside:
        reason = "its path points outside the zip"
    elif flags & _ENCRYPTED:
        reason = "it is encrypted"
    elif method not in _METHODS:
        reason = f"compression method {method} is not supported: only stored, deflate and bzip2"
    return Entry(path=path or "(no name)", size=size, at=at, reason=reason)


def _normalize(name: str) -> tuple[str | None, bool]:
    """Returns an entry's path, None for a folder, and whether it points outside the zip."""
    # some programs on Windows write backslashes
    name = name.replace("\\", "/").split("\0")[0]
    if name.endswith("/"):
        return None, False
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return "/".join(parts), name.startswith("/") or ".." in parts


def _read_zip64(extra: bytes, size: int, compressed_size: int, offset: int) -> tuple[int, int, int]:
    """Replaces the numbers that 32 bits cannot hold by those in the zip64 extra field."""
    position = 0
    while position + 4 <= len(extra):
        header_id, length = struct.unpack_from("<HH", extra, position)
        if header_id == _ZIP64_EXTRA:
            count = min(length, len(extra) - position - 4) // 8
            numbers = iter(struct.unpack_from(f"<{count}Q", extra, position + 4))
            size, compressed_size, offset = (
                next(numbers, 0) if number == _IN_ZIP64_EXTRA else number
                for number in (size, compressed_size, offset)
            )
            break
        position += 4 + length
    return size, compressed_size, offset


def _decompress(compressed: bytes, method: int, size: int) -> bytes:
    """Decompresses at most one byte more than the declared size, so that no zip bomb goes off."""
    if method == _STORED:
        return compressed
    if method == _BZIP2:
        return bz2.BZ2Decompressor().decompress(compressed, size + 1)
    return zlib.decompressobj(-zlib.MAX_WBITS).decompress(compressed, size + 1)
