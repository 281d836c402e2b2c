"""The prepared dataset: its contract, how one picture becomes a row, and reading it back.

A prepared dataset is a folder with ``<split>/part-*.parquet``, ``quarantine.parquet``,
``duplicates.parquet`` and ``dataset.json``, which is written last: a folder without it is not a
prepared dataset.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fer_ray import storage
from fer_ray.data.labels import UNKNOWN_LABEL
from fer_ray.errors import UserError, unknown

FORMAT = 1
"""The version of the folder's layout, in ``dataset.json``."""

INFO_NAME = "dataset.json"
QUARANTINE_NAME = "quarantine.parquet"
DUPLICATES_NAME = "duplicates.parquet"

MIN_IMAGE_SIZE = 8
MAX_IMAGE_SIZE = 1024


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
"""The columns of ``<split>/part-*.parquet``."""

QUARANTINE_SCHEMA = pa.schema(
    [pa.field("path", pa.string(), nullable=False), pa.field("reason", pa.string(), nullable=False)]
)
"""The columns of ``quarantine.parquet``."""

DUPLICATES_SCHEMA = pa.schema(
    [
        pa.field("pixel_sha256", pa.string()),
        pa.field("image_id", pa.string()),
        pa.field("split", pa.string()),
        pa.field("label", pa.string()),
        pa.field("conflicting_labels", pa.bool_()),
    ]
)
"""The columns of ``duplicates.parquet``: the images whose picture stands there more than once."""


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """What ``dataset.json`` says about one split."""

    rows: int
    """Number of images."""
    files: tuple[str, ...]
    """The Parquet parts, relative to the dataset's folder, in the order of `image_id`."""
    classes: Mapping[str, int]
    """Number of images of each label, every label of the dataset named."""
    unlabelled: int = 0
    """Number of images whose label is not known."""


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """A prepared dataset, as its ``dataset.json`` describes it."""

    path: str
    """Absolute local path or URI of the folder."""
    labels: tuple[str, ...]
    """The class names, alphabetical: a label's index is its position here."""
    image_size: int
    """Height and width of every image, in pixels."""
    splits: Mapping[str, SplitInfo]
    """The splits that the dataset has."""
    pixel_mean: float
    """Mean of the train split's pixels, of 1.0."""
    pixel_std: float
    """Population standard deviation of the train split's pixels, of 1.0."""
    data_sha256: str
    """Hash of every row's id, split, label and pixels; the same however the parts are cut."""

    def split(self, name: str) -> SplitInfo:
        """One split by name.

        Raises:
            UserError: when the dataset has no such split.
        """
        if name not in self.splits:
            raise unknown(f"--split of {self.path}", name, self.splits)
        return self.splits[name]


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """One split in memory, ordered by `image_ids`."""

    images: np.ndarray
    """(N, H, W) uint8, grey, 0 to 255."""
    labels: np.ndarray
    """(N,) int64, index into the dataset's labels; `UNKNOWN_LABEL` where not known."""
    image_ids: list[str]
    """N unique names: the paths inside the source."""
    pixel_sha256: list[str]
    """N hashes of the pictures as decoded, before resizing: equal for the same picture."""


def read_info(path: str) -> DatasetInfo:
    """Reads ``dataset.json``.

    Raises:
        UserError: when the folder is not a prepared dataset, or one of another format.
    """
    path = storage.absolute(path)
    info_path = storage.join(path, INFO_NAME)
    if not storage.exists(info_path):
        raise UserError(
            f"{path} is not a prepared dataset (no {INFO_NAME}): make one with jobs/prepare.py"
        )
    try:
        value = storage.read_json(info_path)
        if value["format"] != FORMAT:
            raise UserError(
                f"{info_path}: format {value['format']}, this version reads {FORMAT}: "
                "run jobs/prepare.py again"
            )
        return _parse_info(path, value)
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise UserError(f"{info_path} is damaged ({error!r}): prepare it again") from error
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{info_path} is not valid JSON ({error})") from error


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
    """Reads one split into memory: `rows * image_size**2` bytes and the names.

    Raises:
        UserError: when there is no such split, or its files do not hold what ``dataset.json``
            promises.
    """
    split = info.split(name)
    fs, root = storage.filesystem(info.path)
    columns = ["image_id", "label", "image", "pixel_sha256"]
    paths = [storage.join(root, file) for file in split.files]
    try:
        # partitioning=None: a folder called key=value above the dataset is no column of it
        table = pq.read_table(paths, columns=columns, filesystem=fs, partitioning=None)
    except (OSError, pa.ArrowInvalid) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{info.path}: split {name!r} cannot be read: {reason}") from error
    if table.num_rows != split.rows:
        raise UserError(
            f"{info.path}: split {name!r} has {table.num_rows} rows, {INFO_NAME} says "
            f"{split.rows}: run jobs/prepare.py again"
        )
    return Split(
        images=stack(table["image"], info.image_size),
        labels=label_indices(table["label"], info.labels),
        image_ids=table["image_id"].to_pylist(),
        pixel_sha256=table["pixel_sha256"].to_pylist(),
    )


def stack(column: pa.ChunkedArray, size: int) -> np.ndarray:
    """The images of a binary column as one writable array, copied once, buffer by buffer."""
    images = np.empty((len(column), size, size), np.uint8)
    row = 0
    for chunk in column.chunks:
        if len(chunk) == 0:
            continue
        lengths = pc.binary_length(chunk)
        if pc.min(lengths).as_py() != size * size or pc.max(lengths).as_py() != size * size:
            raise UserError(f"an image is not {size} x {size} bytes: run jobs/prepare.py again")
        _, offsets, values = chunk.buffers()
        start = np.frombuffer(offsets, np.int32)[chunk.offset]
        flat = np.frombuffer(values, np.uint8, count=len(chunk) * size * size, offset=start)
        images[row : row + len(chunk)] = flat.reshape(len(chunk), size, size)
        row += len(chunk)
    return images


def label_indices(column: pa.ChunkedArray, labels: tuple[str, ...]) -> np.ndarray:
    indices = pc.index_in(column, value_set=pa.array(labels, pa.string()))
    if indices.null_count != column.null_count:
        raise UserError(f"a label is not one of {', '.join(labels)}: run jobs/prepare.py again")
    return pc.fill_null(indices, UNKNOWN_LABEL).to_numpy().astype(np.int64)
