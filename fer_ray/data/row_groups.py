"""The row groups of a split's Parquet files: what streaming reads and shuffles."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pyarrow.parquet as pq

from fer_ray import storage
from fer_ray.data import dataset, parquet
from fer_ray.data.dataset import DatasetInfo
from fer_ray.data.integrity import check_size
from fer_ray.data.json_values import damaged
from fer_ray.errors import UserError


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
        UserError: when a file cannot be read, or has another size, other columns or another
            number of rows than ``dataset.json`` says.
    """
    slices, first = [], 0
    for file in info.split(split).files:
        path = storage.join(info.path, file)
        metadata = _read_metadata(path, info.split(split).parts[file])
        for number in range(metadata.num_row_groups):
            rows = metadata.row_group(number).num_rows
            slices.append(
                RowGroupSlice(file=path, row_group=number, begin=0, end=rows, first=first)
            )
            first += rows
    return slices


def _read_metadata(path: str, part: dataset.Part) -> pq.FileMetaData:
    try:
        check_size(path, part, advice=dataset.ADVICE)
        fs, inner = storage.filesystem(path)
        metadata = pq.read_metadata(inner, filesystem=fs)
        parquet.check_metadata(metadata, path, columns=dataset.SCHEMA, advice=dataset.ADVICE)
    except UserError:
        raise
    except parquet.ERRORS as error:
        raise dataset.cannot_be_read(path, error) from error
    if metadata.num_rows != part.rows:
        reason = f"it has {metadata.num_rows:,} rows, {dataset.INFO_NAME} says {part.rows:,}"
        raise damaged(path, reason, dataset.ADVICE)
    return metadata


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
