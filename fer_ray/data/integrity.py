"""Hashes of files and of JSON objects: what was written is what is read, or it is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import pyarrow as pa

from fer_ray import storage
from fer_ray.data.json_values import Record, damaged

HASH_KEY = "content_sha256"
"""The key of a JSON object with the hash of all its other keys and values."""


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Size and hash of a file, as recorded in another file when it was written."""

    num_bytes: int
    """Size of the file."""
    sha256: str
    """SHA-256 of its content, in hexadecimal."""

    @classmethod
    def of(cls, content: bytes | memoryview | pa.Buffer) -> Self:
        """The record of a content."""
        return cls(num_bytes=len(memoryview(content)), sha256=hashlib.sha256(content).hexdigest())

    @classmethod
    def parse(cls, record: Record) -> Self:
        """The record that `to_dict` has described; raises `UserError` for another one."""
        return cls(num_bytes=record.integer("num_bytes"), sha256=record.sha256("sha256"))

    def to_dict(self) -> dict[str, Any]:
        """A JSON object of the fields."""
        return asdict(self)


def read_file(path: str, record: FileRecord, *, advice: str) -> bytes:
    """Reads a file whole, and checks it against its record.

    Args:
        path: local path or URI.
        record: what the content has to be. A file of another size is not read.
        advice: what to do about a damaged file; the end of the message.

    Raises:
        UserError: where the file differs from the record, or is no regular file.
        OSError: where it is missing or cannot be read.
    """
    check_size(path, record, advice=advice)
    fs, inner = storage.filesystem(path)
    with fs.open_input_file(inner) as stream:
        content = stream.read(record.num_bytes)
    if hashlib.sha256(content).hexdigest() != record.sha256:
        raise damaged(path, "its SHA-256 is not the one that was recorded", advice)
    return content


def check_size(path: str, record: FileRecord, *, advice: str) -> None:
    """Checks, without reading it, that a file has the size of its record; raises as `read_file`."""
    if (size := storage.file_size(path)) != record.num_bytes:
        raise damaged(path, f"it has {size:,} bytes instead of {record.num_bytes:,}", advice)


def with_hash(value: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with the hash of its content, as `check_hash` expects it."""
    plain = json.loads(json.dumps(value))  # as it will be read: keys are strings, tuples lists
    plain.pop(HASH_KEY, None)
    return {**plain, HASH_KEY: _digest(plain)}


def check_hash(record: Record) -> None:
    """Checks that a JSON object has the hash of its content.

    Raises:
        UserError: where it has another one, or none.
    """
    recorded = record.sha256(HASH_KEY)
    rest = {key: value for key, value in record.value.items() if key != HASH_KEY}
    if _digest(rest) != recorded:
        raise record.error(f"{HASH_KEY} is not the hash of its content")


def _digest(value: Mapping[str, Any]) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
