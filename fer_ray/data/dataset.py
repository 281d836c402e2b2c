"""The prepared dataset: its files and columns, and how to read it.

A prepared dataset is a folder with ``<split>/part-*.parquet``, ``quarantine.parquet``,
``duplicates.parquet`` and ``dataset.json``. The last one is written at the very end, so a folder
without it is not a complete dataset. It has the hash of every part and of its own content: a part
is read only if it is the one that was written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fer_ray import storage
from fer_ray.data import parquet
from fer_ray.data.integrity import FileRecord, check_hash, read_file, with_hash
from fer_ray.data.json_values import Record, damaged
from fer_ray.data.labels import SPLITS, UNKNOWN_LABEL
from fer_ray.errors import UserError, first_line, unknown

FORMAT = 2
"""Version of the folder's layout; ``format`` in ``dataset.json``. Format 1 had no hashes."""

ADVICE = "run jobs/prepare.py again"
"""What to do about a dataset that is damaged or of another format."""

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
class Part(FileRecord):
    """One Parquet shard as described in ``dataset.json``: its size, its hash, its rows."""

    rows: int
    """Number of images."""


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """One split as described in ``dataset.json``."""

    rows: int
    """Number of images."""
    files: tuple[str, ...]
    """The Parquet shards, relative to the dataset's folder, in the order of `image_id`."""
    parts: Mapping[str, Part]
    """What each of `files` has to be."""
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


def write_info(folder: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """Writes ``dataset.json``.

    Args:
        folder: path or URI of the dataset.
        value: the content without the format and the hash of the content.

    Returns:
        The content.
    """
    content = with_hash({"format": FORMAT, **value})
    storage.write_json(storage.join(folder, INFO_NAME), content)
    return content


def read_info(path: str) -> DatasetInfo:
    """Reads ``dataset.json`` and checks it against its own hash.

    Args:
        path: path or URI of a prepared dataset.

    Raises:
        UserError: when the folder is not a prepared dataset, has another format version, or when
            the file is damaged.
    """
    path = storage.absolute(path)
    info_path = storage.join(path, INFO_NAME)
    try:
        record = Record(info_path, storage.read_json(info_path), advice=ADVICE)
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is not a prepared dataset (no {INFO_NAME}): create one with jobs/prepare.py"
        ) from error
    except UserError as error:
        raise UserError(f"{error}: {ADVICE}") from error
    if (version := record.integer("format")) != FORMAT:
        raise UserError(
            f"{info_path} has format {version}, this version reads format {FORMAT}: {ADVICE}"
        )
    check_hash(record)
    return _parse_info(path, record)


def _parse_info(path: str, record: Record) -> DatasetInfo:
    labels = record.texts("labels")
    if not labels or list(labels) != sorted(labels):
        raise record.error("labels are not in alphabetical order")
    splits = {name: _parse_split(name, split) for name, split in record.record("splits").records()}
    if unknown_splits := splits.keys() - set(SPLITS):
        raise record.error(f"there is no split {min(unknown_splits)!r}")
    return DatasetInfo(
        path=path,
        labels=labels,
        image_size=record.integer("image_size", MIN_IMAGE_SIZE, MAX_IMAGE_SIZE),
        splits=splits,
        pixel_mean=record.number("pixel_mean", 0.0, 1.0),
        pixel_std=record.number("pixel_std", 0.0, 1.0),
        data_sha256=record.sha256("data_sha256"),
    )


def _parse_split(name: str, split: Record) -> SplitInfo:
    """One split; its files have to lie in its own folder."""
    files, described = split.texts("files"), split.record("parts")
    for file in files:
        folder, _, base = file.partition("/")
        if folder != name or not storage.is_plain_name(base):
            raise split.error(f"{file!r} is not the path of a part of {name}")
    if set(files) != described.value.keys():
        raise split.error(f"files and parts of {name} differ")
    parts = {
        file: Part(**vars(FileRecord.parse(part)), rows=part.integer("rows"))
        for file, part in described.records()
    }
    rows = split.integer("rows")
    if sum(part.rows for part in parts.values()) != rows:
        raise split.error(f"the parts of {name} do not have its {rows:,} rows")
    classes = split.record("classes")
    return SplitInfo(
        rows=rows,
        files=files,
        parts=parts,
        classes={label: classes.integer(label) for label in classes.value},
        unlabelled=split.integer("unlabelled"),
    )


def load_split(info: DatasetInfo, name: str) -> Split:
    """Reads one split into memory, which takes `rows * image_size**2` bytes and the names.

    Raises:
        UserError: when there is no such split, or when a part is not the one that
            ``dataset.json`` describes.
    """
    split, size = info.split(name), info.image_size
    try:
        images = np.empty((split.rows, size, size), np.uint8)
    except MemoryError as error:
        raise UserError(f"{info.path}: {name} does not fit into memory: {error}") from error
    labels: list[np.ndarray] = [np.empty(0, np.int64)]
    image_ids: list[str] = []
    pixel_sha256: list[str] = []
    for file in split.files:
        table = read_part(info, name, file)
        begin = len(image_ids)
        images[begin : begin + len(table)] = stack(table["image"], size)
        labels.append(label_indices(table["label"], info.labels))
        image_ids += table["image_id"].to_pylist()
        pixel_sha256 += table["pixel_sha256"].to_pylist()
    if len(set(image_ids)) != len(image_ids):
        raise damaged(info.path, f"an image_id occurs more than once in {name}", ADVICE)
    return Split(
        images=images,
        labels=np.concatenate(labels),
        image_ids=image_ids,
        pixel_sha256=pixel_sha256,
    )


def read_part(info: DatasetInfo, split: str, file: str) -> pa.Table:
    """Reads one shard whole, and checks that it is the one that ``dataset.json`` describes.

    Args:
        info: the dataset.
        split: name of the split.
        file: one of the split's `files`.

    Returns:
        The rows, with the columns of `SCHEMA`.

    Raises:
        UserError: where its size, its hash, its columns or its rows are others.
    """
    path, part = storage.join(info.path, file), info.split(split).parts[file]
    try:
        content = read_file(path, part, advice=ADVICE)
    except OSError as error:
        raise cannot_be_read(path, error) from error
    table = parquet.parse(content, path, columns=SCHEMA, advice=ADVICE)
    if problem := _problem(table, info, split, part.rows):
        raise damaged(path, problem, ADVICE)
    return table


def _problem(table: pa.Table, info: DatasetInfo, split: str, rows: int) -> str | None:
    """What is wrong with the rows of a part; None: nothing."""
    size = info.image_size
    if table.num_rows != rows:
        return f"it has {table.num_rows:,} rows, {INFO_NAME} says {rows:,}"
    for field in SCHEMA:
        if not field.nullable and table[field.name].null_count:
            return f"{field.name} is null in {table[field.name].null_count:,} rows"
    for name, value in (("split", split), ("height", size), ("width", size)):
        if not pc.all(pc.equal(table[name], value), min_count=0).as_py():
            return f"{name} is not {value} in every row"
    if not pc.all(pc.equal(pc.binary_length(table["image"]), size * size), min_count=0).as_py():
        return f"an image does not have {size} x {size} pixels"
    if pc.count_distinct(table["image_id"]).as_py() != rows:
        return "an image_id occurs more than once"
    known = pc.is_in(table["label"], value_set=pa.array([*info.labels, None], pa.string()))
    return None if pc.all(known, min_count=0).as_py() else _unknown_label(info.labels)


def cannot_be_read(path: str, error: BaseException) -> UserError:
    """Builds the error for a part that is missing or cannot be read."""
    return UserError(f"{path} cannot be read: {first_line(error)}")


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
            raise UserError(f"an image does not have {size} x {size} pixels: {ADVICE}")
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
        raise UserError(f"{_unknown_label(labels)}: {ADVICE}")
    return pc.fill_null(indices, UNKNOWN_LABEL).to_numpy().astype(np.int64)


def _unknown_label(labels: tuple[str, ...]) -> str:
    return f"a label is not one of {', '.join(labels)}"
