"""The prepared dataset: its files and columns, and how to read it.

A prepared dataset is a folder with ``<split>/part-*.parquet``, ``quarantine.parquet``,
``duplicates.parquet`` and ``dataset.json``. The last one is written at the very end, so a folder
without it is not a complete dataset.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from fer_ray import storage
from fer_ray.data.labels import UNKNOWN_LABEL
from fer_ray.errors import UserError, first_line, unknown

FORMAT = 1
"""Version of the folder's layout; ``format`` in ``dataset.json``."""

INFO_NAME = "dataset.json"
QUARANTINE_NAME = "quarantine.parquet"
DUPLICATES_NAME = "duplicates.parquet"

MIN_IMAGE_SIZE = 8
MAX_IMAGE_SIZE = 1024
"""Limits of ``--image-size``, in pixels."""

SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("pixel_sha256", pa.string(), nullable=False),
    ]
)
"""Columns of ``<split>/part-*.parquet``; `image` holds height * width grey values, row by row."""

QUARANTINE_SCHEMA = pa.schema(
    [pa.field("path", pa.string(), nullable=False), pa.field("reason", pa.string(), nullable=False)]
)
"""Columns of ``quarantine.parquet``: one row for each file that did not become an image."""

DUPLICATES_SCHEMA = pa.schema(
    [
        pa.field("pixel_sha256", pa.string()),
        pa.field("image_id", pa.string()),
        pa.field("split", pa.string()),
        pa.field("label", pa.string()),
        pa.field("conflicting_labels", pa.bool_()),
    ]
)
"""Columns of ``duplicates.parquet``: one row for each image whose pixels occur more than once."""


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """One split as described in ``dataset.json``."""

    rows: int
    """Number of images."""
    files: tuple[str, ...]
    """The Parquet shards, relative to the dataset's folder, in the order of `image_id`."""
    classes: Mapping[str, int]
    """Number of images of every label of the dataset; 0 where the split has none."""
    unlabelled: int = 0
    """Number of images without a label."""


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """A prepared dataset as described in its ``dataset.json``."""

    path: str
    """Absolute local path or URI of the folder."""
    labels: tuple[str, ...]
    """Class names in alphabetical order; a label's index is its position here."""
    image_size: int
    """Height and width of every image, in pixels."""
    splits: Mapping[str, SplitInfo]
    """The splits that exist, by name."""
    pixel_mean: float
    """Mean of the train pixels, scaled to 0..1."""
    pixel_std: float
    """Population standard deviation of the train pixels, scaled to 0..1."""
    data_sha256: str
    """Hash of the id, split, label and pixels of all rows; independent of the shards."""

    def split(self, name: str) -> SplitInfo:
        """Returns one split.

        Raises:
            UserError: when the dataset has no split of that name.
        """
        if name not in self.splits:
            raise unknown(f"--split of {self.path}", name, self.splits)
        return self.splits[name]


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """One split in memory, in the order of `image_ids`."""

    images: np.ndarray
    """(N, H, W) uint8, grey, 0 to 255."""
    labels: np.ndarray
    """(N,) int64 indices into the dataset's labels; `UNKNOWN_LABEL` for images without one."""
    image_ids: list[str]
    """N unique names: the paths within the source."""
    pixel_sha256: list[str]
    """N hashes of the decoded pixels before resizing; duplicates have equal hashes."""


def read_info(path: str) -> DatasetInfo:
    """Reads ``dataset.json``.

    Args:
        path: path or URI of a prepared dataset.

    Raises:
        UserError: when the folder is not a prepared dataset, or has another format version.
    """
    path = storage.absolute(path)
    info_path = storage.join(path, INFO_NAME)
    if not storage.exists(info_path):
        raise UserError(
            f"{path} is not a prepared dataset (no {INFO_NAME}): create one with jobs/prepare.py"
        )
    try:
        value = storage.read_json(info_path)
        if value["format"] != FORMAT:
            raise UserError(
                f"{info_path} has format {value['format']}, this version reads format {FORMAT}: "
                "run jobs/prepare.py again"
            )
        return _parse_info(path, value)
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise UserError(f"{info_path} is damaged ({error!r}): run jobs/prepare.py again") from error
    except UserError:
        raise
    except ValueError as error:
        raise UserError(
            f"{info_path} is not valid JSON ({error}): run jobs/prepare.py again"
        ) from error


def _parse_info(path: str, value: dict[str, Any]) -> DatasetInfo:
    splits = {
        name: SplitInfo(
            rows=split["rows"],
            files=tuple(split["files"]),
            classes=dict(split["classes"]),
            unlabelled=split["unlabelled"],
        )
        for name, split in value["splits"].items()
    }
    return DatasetInfo(
        path=path,
        labels=tuple(value["labels"]),
        image_size=value["image_size"],
        splits=splits,
        pixel_mean=value["pixel_mean"],
        pixel_std=value["pixel_std"],
        data_sha256=value["data_sha256"],
    )


def load_split(info: DatasetInfo, name: str) -> Split:
    """Reads one split into memory, which takes `rows * image_size**2` bytes and the names.

    Raises:
        UserError: when there is no such split, or when its files do not agree with
            ``dataset.json``.
    """
    split = info.split(name)
    fs, root = storage.filesystem(info.path)
    columns = ["image_id", "label", "image", "pixel_sha256"]
    paths = [storage.join(root, file) for file in split.files]
    try:
        # not `pq.read_table`, which imports pandas: a tenth of the start of a local job
        table = pa.concat_tables(
            [_read(fs, file, columns) for file in paths], promote_options="permissive"
        )
    except (OSError, pa.ArrowInvalid, KeyError) as error:
        raise UserError(
            f"{info.path}: split {name!r} cannot be read: {first_line(error)}"
        ) from error
    if table.num_rows != split.rows:
        raise mismatch_error(info, name, table.num_rows)
    return Split(
        images=stack(table["image"], info.image_size),
        labels=label_indices(table["label"], info.labels),
        image_ids=table["image_id"].to_pylist(),
        pixel_sha256=table["pixel_sha256"].to_pylist(),
    )


def _read(fs: pafs.FileSystem, path: str, columns: list[str]) -> pa.Table:
    with fs.open_input_file(path) as stream:
        return pq.ParquetFile(stream, pre_buffer=True).read(columns).select(columns)


def mismatch_error(info: DatasetInfo, split: str, rows: int) -> UserError:
    """Builds the error for a split whose files hold another number of rows than expected."""
    return UserError(
        f"{info.path}: split {split!r} has {rows} rows, {INFO_NAME} says "
        f"{info.split(split).rows}: run jobs/prepare.py again"
    )


def stack(column: pa.ChunkedArray, size: int) -> np.ndarray:
    """Copies a binary column of images, buffer by buffer, into one writable array.

    Args:
        column: N values of `size * size` bytes.
        size: height and width, in pixels.

    Returns:
        (N, size, size) uint8.

    Raises:
        UserError: when a value has another length.
    """
    images = np.empty((len(column), size, size), np.uint8)
    row = 0
    for chunk in column.chunks:
        if len(chunk) == 0:
            continue
        lengths = pc.binary_length(chunk)
        if pc.min(lengths).as_py() != size * size or pc.max(lengths).as_py() != size * size:
            raise UserError(
                f"an image does not have {size} x {size} pixels: run jobs/prepare.py again"
            )
        _, offsets, values = chunk.buffers()
        start = np.frombuffer(offsets, np.int32)[chunk.offset]
        flat = np.frombuffer(values, np.uint8, count=len(chunk) * size * size, offset=start)
        images[row : row + len(chunk)] = flat.reshape(len(chunk), size, size)
        row += len(chunk)
    return images


def label_indices(column: pa.ChunkedArray, labels: tuple[str, ...]) -> np.ndarray:
    """Converts a string column of labels to indices.

    Returns:
        (N,) int64 indices into `labels`; `UNKNOWN_LABEL` for nulls.

    Raises:
        UserError: for a value that is not in `labels`.
    """
    indices = pc.index_in(column, value_set=pa.array(labels, pa.string()))
    if indices.null_count != column.null_count:
        raise UserError(f"a label is not one of {', '.join(labels)}: run jobs/prepare.py again")
    return pc.fill_null(indices, UNKNOWN_LABEL).to_numpy().astype(np.int64)
