"""The work of the tasks: decode and write one shard, and later rewrite it without some rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fer_ray import storage
from fer_ray.data import dataset, decoding
from fer_ray.data.image_source import ImageSource
from fer_ray.data.integrity import FileRecord
from fer_ray.data.labels import SPLITS
from fer_ray.data.parquet import output_not_shared_error, write_table
from fer_ray.data.sources.files import ReadError
from fer_ray.preparation.inventory import RESULTS, Inventory

ROWS_PER_SHARD = 2048
"""Maximum rows of a shard; shards of nearly equal size keep all CPUs busy."""

MANY_SHARDS = 64
"""With more shards than this, they are twice as long: Ray keeps each task's data in memory."""

ROWS_PER_GROUP = 256
"""Maximum rows of a row group, the unit in which streaming shuffles."""

BYTES_PER_SHARD = 64 * 2**20
"""Maximum pixel bytes of a shard; bounds a worker's memory when images are large."""

_COMPRESSED = pa.ipc.IpcWriteOptions(compression="zstd")

_TASK_FILES = pa.schema([("path", pa.string()), ("label", pa.string()), ("at", pa.binary())])
_TASK_ROWS = pa.schema([("path", pa.string()), ("split", pa.string())])
REWRITTEN = pa.schema(
    [RESULTS.field(name) for name in ("shard", "path", "row_sha256", "shard_bytes", "shard_sha256")]
)
"""Columns of `rewrite_shard`'s result: where each row is now, and its new hash."""


# ------------------------------------------------------------------ the tasks, in the driver


def write_tasks(inventory: Inventory, image_size: int) -> Iterator[dict[str, Any]]:
    """Divides each split, ordered by path, into shards of nearly equal length.

    Yields:
        Arguments of `write_shard`. The files are compressed, because all tasks of a large source
        are in memory at the same time.
    """
    counts = inventory.counts()
    rows_per_shard = ROWS_PER_SHARD
    if sum(counts.values()) > MANY_SHARDS * ROWS_PER_SHARD:
        rows_per_shard *= 2
    most = max(1, min(rows_per_shard, BYTES_PER_SHARD // image_size**2))
    for split, total in counts.items():
        rows = inventory.rows(
            'SELECT path, label, "at" FROM listed WHERE reason IS NULL AND split = ? ORDER BY path',
            split,
        )
        count = -(-total // most)
        for number in range(count):
            length = total * (number + 1) // count - total * number // count
            files = [next(rows) for _ in range(length)]
            shard = f"{split}/part-{number:05d}.parquet"
            yield {"shard": shard, "split": split, "files": _pack(files, _TASK_FILES)}


def rewrite_tasks(inventory: Inventory) -> Iterator[dict[str, Any]]:
    """Yields arguments of `rewrite_shard` for shards with rows that are moved or dropped."""
    changed = inventory.rows(
        "SELECT shard FROM results WHERE pixel_sha256 IS NOT NULL GROUP BY shard "
        "HAVING bool_or(reason IS NOT NULL OR split <> split_part(shard, '/', 1)) ORDER BY shard"
    )
    for (shard,) in changed:
        rows = inventory.rows(
            "SELECT path, CASE WHEN reason IS NULL THEN split END FROM results "
            "WHERE shard = ? AND pixel_sha256 IS NOT NULL ORDER BY path",
            shard,
        )
        yield {"shard": shard, "rows": _pack(rows, _TASK_ROWS)}


def _pack(rows: Iterable[tuple[Any, ...]], schema: pa.Schema) -> bytes:
    columns = list(zip(*rows))
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema)]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema, options=_COMPRESSED) as stream:
        stream.write_table(pa.Table.from_arrays(arrays, schema=schema))
    return sink.getvalue().to_pybytes()


def _unpack(packed: bytes) -> dict[str, list[Any]]:
    with pa.ipc.open_stream(packed) as stream:
        return stream.read_all().to_pydict()


# ------------------------------------------------------------------ the work, in the workers


def write_shard(batch: pa.Table, *, images: ImageSource, staging: str, size: int) -> pa.Table:
    """Decodes the images of one shard and writes it.

    Args:
        batch: one task of `write_tasks`, as a table with one row.
        images: where the images come from.
        staging: absolute path or URI of the unfinished dataset.
        size: height and width of the written images, in pixels.

    Returns:
        One row per file, columns as in `RESULTS`.

    Raises:
        UserError: when this machine cannot access the source or `staging`.
        OSError: when the shard cannot be written for another reason.
    """
    cv2.setNumThreads(1)  # Ray runs one task per CPU: more threads would only compete
    (task,) = batch.to_pylist()
    files = _unpack(task["files"])
    count = len(files["path"])
    reasons: list[str | None] = [None] * count
    digests: list[bytes | None] = [None] * count
    pixels = np.empty((count, size, size), np.uint8)
    decoded: list[int] = []
    for index, (path, at) in enumerate(zip(files["path"], files["at"])):
        try:
            grey = images.grey(path, at)
        except (ReadError, decoding.DecodeError) as error:
            reasons[index] = str(error)
            continue
        digests[index] = decoding.pixel_digest(grey)
        pixels[len(decoded)] = decoding.fit(grey, size)
        decoded.append(index)
    rows = _Rows(
        split=task["split"],
        paths=[files["path"][i] for i in decoded],
        labels=[files["label"][i] for i in decoded],
        pixel_sha256=[digests[i].hex() for i in decoded],  # type: ignore[union-attr]
        images=pixels[: len(decoded)],
    )
    shard = rows.write(staging, task["shard"]) if decoded else None
    return _results(task, files, reasons, digests, decoded, rows, shard)


def _results(
    task: dict[str, Any],
    files: dict[str, list[Any]],
    reasons: list[str | None],
    digests: list[bytes | None],
    decoded: list[int],
    rows: _Rows,
    shard: FileRecord | None,
) -> pa.Table:
    count = len(reasons)
    sums: list[Any] = [None] * count
    squares, row_digests = list(sums), list(sums)
    for index, (total, squared), digest in zip(decoded, rows.moments(), rows.hash()):
        sums[index], squares[index], row_digests[index] = total, squared, digest
    columns = [
        *([task["shard"]] * count, files["path"], [task["split"]] * count, files["label"]),
        *(reasons, digests, row_digests, sums, squares),
        *_shard_columns(shard, count),
    ]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, RESULTS)]
    return pa.Table.from_arrays(arrays, schema=RESULTS)


def _shard_columns(shard: FileRecord | None, count: int) -> list[list[Any]]:
    """Size and hash of a shard, once for each row; null where none was written."""
    values = (shard.num_bytes, shard.sha256) if shard else (None, None)
    return [[value] * count for value in values]


def rewrite_shard(batch: pa.Table, *, staging: str) -> pa.Table:
    """Distributes the rows of a shard over new shards, one per split, and drops the others.

    Args:
        batch: one task of `rewrite_tasks`, as a table with one row.
        staging: absolute path or URI of the unfinished dataset.

    Returns:
        One row per image that is left, columns as in `REWRITTEN`.

    Raises:
        UserError: when this machine cannot access the shard.
        OSError: when it cannot be read or written for another reason.
    """
    (task,) = batch.to_pylist()
    targets = _unpack(task["rows"])
    fs, path = storage.filesystem(storage.join(staging, task["shard"]))
    try:
        table = pq.read_table(path, filesystem=fs, partitioning=None)
    except FileNotFoundError as error:
        raise output_not_shared_error(storage.parent_of(staging)) from error
    assert table["image_id"].to_pylist() == targets["path"], f"{task['shard']} holds other rows"
    # the old shard stays, under another name: Ray may run this task again
    name = task["shard"].split("/", 1)[1].replace(".parquet", "-rewritten.parquet")
    rewritten = [REWRITTEN.empty_table()]
    for split in SPLITS:
        selected = [index for index, target in enumerate(targets["split"]) if target == split]
        if not selected:
            continue
        rows = _Rows.of(table.take(selected), split)
        shard = f"{split}/{name}"
        written = rows.write(staging, shard)
        count = len(selected)
        columns = [[shard] * count, rows.paths, rows.hash(), *_shard_columns(written, count)]
        rewritten.append(pa.table(columns, schema=REWRITTEN))
    return pa.concat_tables(rewritten)


class _Rows:
    """The rows of one shard."""

    def __init__(
        self,
        *,
        split: str,
        paths: list[str],
        labels: list[str | None],
        pixel_sha256: list[str],
        images: np.ndarray,
    ) -> None:
        self.split, self.paths, self.labels = split, paths, labels
        self.pixel_sha256, self.images = pixel_sha256, images

    @classmethod
    def of(cls, table: pa.Table, split: str) -> _Rows:
        """Converts rows of the dataset, and assigns them to a split."""
        size = table["height"][0].as_py()
        return cls(
            split=split,
            paths=table["image_id"].to_pylist(),
            labels=table["label"].to_pylist(),
            pixel_sha256=table["pixel_sha256"].to_pylist(),
            images=dataset.stack(table["image"], size),
        )

    def write(self, staging: str, shard: str) -> FileRecord:
        """Writes them as a Parquet file; returns its size and hash."""
        count, size = len(self.images), self.images.shape[1]
        offsets = np.arange(count + 1, dtype=np.int32) * (size * size)
        pixels = pa.Array.from_buffers(
            pa.binary(), count, [None, pa.py_buffer(offsets), pa.py_buffer(self.images)]
        )
        side = pa.array(np.full(count, size, np.int32))
        columns = [
            pa.array(self.paths, pa.string()),
            pa.array([self.split] * count, pa.string()),
            pa.array(self.labels, pa.string()),
            *(pixels, side, side, pa.array(self.pixel_sha256, pa.string())),
        ]
        return write_table(
            pa.Table.from_arrays(columns, schema=dataset.SCHEMA),
            staging,
            shard,
            row_group_size=ROWS_PER_GROUP,
            use_dictionary=["split", "label"],
            write_statistics=["image_id", "split", "label"],
        )

    def hash(self) -> list[bytes]:
        """Returns the SHA-256 of each row's id, split, label, shape and pixels."""
        size = self.images.shape[1]
        end = f"{size}x{size}:"
        return [
            hashlib.sha256(
                f"{path}\0{self.split}\0{label or ''}\0{end}".encode() + image.tobytes()
            ).digest()
            for path, label, image in zip(self.paths, self.labels, self.images)
        ]

    def moments(self) -> list[list[int]]:
        """Returns for each image the sum of its pixels, and the sum of their squares."""
        # round: OpenCV computes the squared norm as the square of a root
        return [
            [int(cv2.sumElems(image)[0]), round(cv2.norm(image, cv2.NORM_L2SQR))]
            for image in self.images
        ]
