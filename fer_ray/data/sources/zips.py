"""A zip, read where it lies: listed entry by entry, never unpacked and never held whole.

Python's `zipfile` keeps an object of half a kilobyte for each entry, in every process that opens
the zip. Here the driver reads the zip's directory once, in blocks, and each entry carries where
its bytes are, so that workers read nothing else. The layout is that of PKWARE's APPNOTE 6.3.10.
"""

from __future__ import annotations

import bz2
import hashlib
import io
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from fer_ray import storage
from fer_ray.data.sources.files import Entry, ReadError, check_size
from fer_ray.errors import UserError, first_line

_END = struct.Struct("<4s4H2LH")
_END_MARK = b"PK\x05\x06"
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64_LOCATOR_MARK = b"PK\x06\x07"
_END64 = struct.Struct("<4sQ2H2L4Q")
_END64_MARK = b"PK\x06\x06"
_RECORD = struct.Struct("<4s6H3L5H2L")
_RECORD_MARK = b"PK\x01\x02"
_LOCAL = struct.Struct("<4s5H3L2H")
_LOCAL_MARK = b"PK\x03\x04"
_LONGEST_COMMENT = 2**16 - 1
_ENCRYPTED, _UTF8 = 0x1, 0x800
_STORED, _DEFLATED, _BZIP2 = 0, 8, 12
_ZIP64_EXTRA = 1
_WHOLLY_64 = 2**32 - 1

_AT = struct.Struct("<QQQLH")
"""An entry's `at`: offset of its local header, bytes packed, bytes unpacked, CRC-32, method."""

_PLAIN = re.compile(r"(?:[^./\\\0][^/\\\0]*/)*[^./\\\0][^/\\\0]*\Z")
"""A path whose components are neither empty nor begin with a dot."""

_BLOCK = 2**20
_SLACK = 128
"""Bytes read beyond an entry's name: local headers may have longer extra fields."""


class _Damaged(Exception):
    """What prevents the zip as a whole from being read."""


@dataclass(frozen=True, kw_only=True)
class _Directory:
    """Where the zip's directory is."""

    offset: int
    size: int
    count: int
    """How many entries it says to have."""
    shift: int
    """Bytes before the zip's own first byte, as in a self-extracting one."""


class ZipSource:
    """The files of a zip."""

    kind = "zip"

    def __init__(self, path: str) -> None:
        self.path = path

    def entries(self) -> Iterator[Entry]:
        """Every file, in the order of the zip's directory."""
        try:
            directory = _find_directory(self._file)
            count = 0
            for record in _records(self._file, directory):
                count += 1
                if entry := _entry(record, directory.shift):
                    yield entry
            if (count ^ directory.count) & 0xFFFF:  # of more, old zips count the last 16 bits
                raise _Damaged(f"its directory has {count:,} entries and says {directory.count:,}")
        except (OSError, pa.ArrowException, _Damaged, struct.error) as error:
            raise UserError(
                f"--source: {self.path} is not a readable zip: {first_line(error)}"
            ) from error

    def read(self, path: str, at: bytes) -> bytes:
        """One file's content; see `Source.read`."""
        offset, packed, size, crc, method = _AT.unpack(at)
        check_size(size)
        # what is stored is no longer than what it unpacks to, but for a few bytes
        check_size(packed - 1024)
        try:
            content = _unpack(self._packed(path, offset, packed), method, size)
        except (OSError, pa.ArrowException, zlib.error, ValueError, OverflowError) as error:
            raise ReadError(f"cannot be unpacked: {first_line(error)}") from error
        if len(content) != size or zlib.crc32(content) != crc:
            raise ReadError("cannot be unpacked: the content is not what the zip says it is")
        return content

    def _packed(self, path: str, offset: int, packed: int) -> bytes:
        """The entry's bytes as they stand in the zip; one read for nearly every entry."""
        block = self._read_at(_LOCAL.size + len(path.encode()) + _SLACK + packed, offset)
        if len(block) < _LOCAL.size or block[:4] != _LOCAL_MARK:
            raise ReadError("cannot be unpacked: there is no such entry at its place")
        *_, name, extra = _LOCAL.unpack_from(block)
        start = _LOCAL.size + name + extra
        if len(block) < start + packed:
            block, start = self._read_at(packed, offset + start), 0
        if len(block) < start + packed:
            raise ReadError("cannot be unpacked: the zip ends before it does")
        return block[start : start + packed]

    def fingerprint(self, listing: Iterator[tuple[str, int]]) -> str:
        """Hash of the zip's bytes."""
        return hash_file(self.path)

    @cached_property
    def _read_at(self) -> Callable[[int, int], bytes]:
        """Reads so many bytes from a place on."""
        if storage.is_uri(self.path):
            return self._file.read_at
        descriptor = self._local.fileno()  # a third of the time of pyarrow's
        return lambda length, offset: os.pread(descriptor, length, offset)

    @cached_property
    def _local(self) -> io.FileIO:
        try:
            return io.FileIO(self.path)
        except OSError as error:
            raise UserError(
                f"--source: {self.path} is not a readable zip: {first_line(error)}"
            ) from error

    @cached_property
    def _file(self) -> pa.NativeFile:
        fs, path = storage.filesystem(self.path)
        try:
            return fs.open_input_file(path)
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"--source: {self.path} is not a readable zip: {first_line(error)}"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}


def hash_file(path: str) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    fs, inner = storage.filesystem(path)
    digest = hashlib.sha256()
    with fs.open_input_stream(inner) as stream:
        while block := stream.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def _find_directory(file: pa.NativeFile) -> _Directory:
    """Reads the record at the zip's end, and the 64-bit one before it where there is one."""
    size = file.size()
    tail_at = max(size - _END.size - _LONGEST_COMMENT, 0)
    tail = file.read_at(size - tail_at, tail_at)
    found = _find_end(tail)
    _, disk, _, _, count, length, offset, _ = _END.unpack_from(tail, found)
    end = tail_at + found
    locator_at = end - _END64_LOCATOR.size
    if locator_at >= 0:
        mark, _, end64, _ = _END64_LOCATOR.unpack(file.read_at(_END64_LOCATOR.size, locator_at))
        if mark == _END64_LOCATOR_MARK:
            end, count, length, offset = _read_end64(file, locator_at, end64)
            disk = 0
    if disk:
        raise _Damaged("it is one of several volumes")
    shift = end - length - offset
    if length > end or shift < 0:
        raise _Damaged("its directory lies outside it")
    return _Directory(offset=offset + shift, size=length, count=count, shift=shift)


def _find_end(tail: bytes) -> int:
    """Where the record at the zip's end begins: one whose comment ends the file, else the last."""
    places = [m.start() for m in re.finditer(re.escape(_END_MARK), tail)]
    places = [path for path in places if len(tail) - path >= _END.size]
    if not places:
        raise _Damaged("it has no directory at its end: cut off, or no zip at all")
    for path in places:
        if path + _END.size + _END.unpack_from(tail, path)[-1] == len(tail):
            return path
    return places[-1]


def _read_end64(file: pa.NativeFile, locator_at: int, stated: int) -> tuple[int, int, int, int]:
    """Place of the 64-bit record; count, length and offset of the directory that it tells."""
    nearest = locator_at - _END64.size
    # bytes before the zip move the record from where the locator says it is
    for path in (nearest, stated):
        # what is stated may be beyond any file, and beyond what a file system takes
        block = file.read_at(_END64.size, path) if 0 <= path <= nearest else b""
        if block.startswith(_END64_MARK):
            *_, count, length, offset = _END64.unpack(block)
            return path, count, length, offset
    raise _Damaged("its 64-bit directory is not where it says")


def _records(file: pa.NativeFile, directory: _Directory) -> Iterator[bytes]:
    """The records of the directory, whole, read in blocks."""
    position, end, buffer, start = directory.offset, directory.offset + directory.size, b"", 0
    while position < end or start < len(buffer):
        length = _RECORD.size
        if len(buffer) - start >= length:
            if buffer[start : start + 4] != _RECORD_MARK:
                raise _Damaged("its directory is damaged")
            fields = _RECORD.unpack_from(buffer, start)
            length += sum(fields[10:13])
        if len(buffer) - start < length:
            if position >= end:
                raise _Damaged("its directory is cut off")
            block = file.read_at(min(_BLOCK, end - position), position)
            if not block:
                raise _Damaged("its directory is cut off")
            buffer, start, position = buffer[start:] + block, 0, position + len(block)
            continue
        yield buffer[start : start + length]
        start += length


def _entry(record: bytes, shift: int) -> Entry | None:
    """One record as an entry; None for a folder."""
    fields = _RECORD.unpack_from(record)
    flags, method, crc, packed, size = (fields[i] for i in (3, 4, 7, 8, 9))
    offset, name_length, extra_length = fields[16], fields[10], fields[11]
    name_end = _RECORD.size + name_length
    raw = record[_RECORD.size : name_end]
    try:
        name = raw.decode()  # with or without the flag: some programs forget it
    except UnicodeDecodeError:
        name = raw.decode("utf-8", "backslashreplace") if flags & _UTF8 else raw.decode("cp437")
    # the way round is only taken where it has to be: a million names add up
    path, leads_out = (name, False) if _PLAIN.match(name) else _mended(name)
    if path is None:
        shown = name.replace("\\", "/").strip("/")
        return Entry(path=shown, reason="a folder with content") if size else None
    if _WHOLLY_64 in (packed, size, offset):
        extra = record[name_end : name_end + extra_length]
        size, packed, offset = _wide(extra, size, packed, offset)
    at, reason = b"", None
    if max(offset + shift, packed, size) >= 2**63:
        reason = "its place is beyond the zip"
    else:
        at = _AT.pack(offset + shift, packed, size, crc, method)
    if leads_out:
        reason = "its path points outside the zip"
    elif flags & _ENCRYPTED:
        reason = "it is encrypted"
    elif method not in (_STORED, _DEFLATED, _BZIP2):
        reason = f"packed by a method that is not read ({method}): stored, deflate, bzip2 are"
    return Entry(path=path or "(no name)", size=size, at=at, reason=reason)


def _mended(name: str) -> tuple[str | None, bool]:
    """An entry's path, None for a folder, and whether it points outside the zip."""
    # some Windows programs write the other slash
    name = name.replace("\\", "/").split("\0")[0]
    if name.endswith("/"):
        return None, False
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return "/".join(parts), name.startswith("/") or ".." in parts


def _wide(extra: bytes, size: int, packed: int, offset: int) -> tuple[int, int, int]:
    """The 64-bit numbers that stand in an extra field where 32 bits do not hold them."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        if kind == _ZIP64_EXTRA:
            count = min(length, len(extra) - position - 4) // 8
            wide = iter(struct.unpack_from(f"<{count}Q", extra, position + 4))
            found = [next(wide, 0) if n == _WHOLLY_64 else n for n in (size, packed, offset)]
            return found[0], found[1], found[2]
        position += 4 + length
    return size, packed, offset


def _unpack(packed: bytes, method: int, size: int) -> bytes:
    """Unpacks at most one byte more than there should be: no bomb goes off."""
    if method == _STORED:
        return packed
    if method == _BZIP2:
        return bz2.BZ2Decompressor().decompress(packed, size + 1)
    # no limit would be 0
    return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, size + 1)
