"""The row groups of a split's Parquet files: what streaming reads and shuffles."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.parquet as pq

from fer_ray import storage
from fer_ray.data.dataset import DatasetInfo, mismatch_error
from fer_ray.errors import UserError, first_line


@dataclass(frozen=True, kw_only=True)
class RowGroupSlice:
    """Consecutive rows of one row group: the smallest unit that is read."""

    file: str
    """Absolute path or URI of the Parquet file."""
    row_group: int
    """Number of the row group within the file, from 0."""
    begin: int
    """First row of the slice, counted within the row group."""
    end: int
    """One past the last row, counted within the row group."""
    first: int
    """Index, within the whole split, of the row group's row 0."""


def row_group_slices(info: DatasetInfo, split: str) -> list[RowGroupSlice]:
    """Returns all row groups of a split, whole and in order; only the files' footers are read.

    Raises:
        UserError: when a file cannot be read, or when the number of rows is not the one in
            ``dataset.json``.
    """
    fs, root = storage.filesystem(info.path)
    slices, first = [], 0
    for file in info.split(split).files:
        try:
            metadata = pq.read_metadata(storage.join(root, file), filesystem=fs)
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"{info.path}: {file} cannot be read: {first_line(error)}") from error
        path = storage.join(info.path, file)
        for number in range(metadata.num_row_groups):
            rows = metadata.row_group(number).num_rows
            slices.append(
                RowGroupSlice(file=path, row_group=number, begin=0, end=rows, first=first)
            )
            first += rows
    if first != info.split(split).rows:
        raise mismatch_error(info, split, first)
    return slices


def take_rows(slices: list[RowGroupSlice], begin: int, end: int) -> list[RowGroupSlice]:
    """Returns the slices that hold rows `begin` to `end` (exclusive) of the concatenated slices."""
    selected, position = [], 0
    for part in slices:
        length = part.end - part.begin
        low, high = max(begin - position, 0), min(end - position, length)
        if low < high:
            selected.append(replace(part, begin=part.begin + low, end=part.begin + high))
        position += length
    return selected
