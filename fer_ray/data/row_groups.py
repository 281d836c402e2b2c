"""The row groups of a split, and slices of them: the unit in which a stream reads."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from fer_ray import storage
from fer_ray.data.dataset import DatasetInfo
from fer_ray.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Some rows of one row group, the unit of reading."""

    file: str
    """Absolute place of the Parquet file."""
    row_group: int
    """Its number in the file."""
    begin: int
    """First row of the row group."""
    end: int
    """One past the last row."""
    first: int
    """Index in the split of the row group's row 0."""


def pieces(info: DatasetInfo, split: str) -> list[Piece]:
    """All row groups of a split, in its order; reads the files' footers.

    Raises:
        UserError: where files cannot be read, or do not hold as many rows as ``dataset.json``
            promises.
    """
    fs, root = storage.filesystem(info.path)
    found, first = [], 0
    for file in info.split(split).files:
        try:
            metadata = pq.read_metadata(storage.join(root, file), filesystem=fs)
        except (OSError, pa.ArrowInvalid) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{info.path}: {file} cannot be read: {reason}") from error
        path = storage.join(info.path, file)
        for number in range(metadata.num_row_groups):
            rows = metadata.row_group(number).num_rows
            found.append(Piece(file=path, row_group=number, begin=0, end=rows, first=first))
            first += rows
    if first != info.split(split).rows:
        raise UserError(
            f"{info.path}: split {split!r} has {first} rows, dataset.json says "
            f"{info.split(split).rows}: run jobs/prepare.py again"
        )
    return found


def cut(found: list[Piece], begin: int, end: int) -> list[Piece]:
    """The pieces that hold rows `begin` to `end` of those of `found`, one after the other."""
    kept, position = [], 0
    for piece in found:
        low = max(begin - position, 0)
        high = min(end - position, piece.end - piece.begin)
        if low < high:
            bounds = {"begin": piece.begin + low, "end": piece.begin + high}
            kept.append(Piece(**{**asdict(piece), **bounds}))
        position += piece.end - piece.begin
    return kept
