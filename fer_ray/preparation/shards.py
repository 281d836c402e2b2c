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
"""With more shards than this, they are twice as long: each is a file, and a task of its own."""

ROWS_PER_GROUP = 256
"""Maximum rows of a row group, the unit in which streaming shuffles."""

BYTES_PER_SHARD = 64 * 2**20
"""Maximum pixel bytes of a shard; bounds a worker's memory when images are large."""

_BLOCK_PIXELS = 2**17
"""Pixels whose moments are computed in one step, to bound the temporary arrays."""

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
        Arguments of `write_shard`. The files are compressed, because dozens of tasks are in memory
        at the same time.
    """
    counts = inventory.counts()
    rows_per_shard = ROWS_PER_SHARD
    if sum(counts.values()) > MANY_SHARDS * ROWS_PER_SHARD:
        rows_per_shard *= 2
    most = max(1, min(rows_per_shard, BYTES_PER_SHARD // image_size**2))
    for split, total in counts.items():
        count = -(-total // most)
        ends = [total * (number + 1) // count for number in range(count)]
        batches = inventory.batches(
            'SELECT path, label, "at" FROM listed '
            f"WHERE reason IS NULL AND split = '{split}' ORDER BY path",
            most,
        )
        for number, files in enumerate(_cut(batches, ends)):
            shard = f"{split}/part-{number:05d}.parquet"
            yield {"shard": shard, "split": split, "files": _pack(files)}


def _cut(batches: Iterable[pa.RecordBatch], ends: list[int]) -> Iterator[pa.Table]:
    """Cuts rows into tables that end before the rows with these numbers."""
    remaining = iter(batches)
    rows, start = _TASK_FILES.empty_table(), 0
    for end in ends:
        while len(rows) < end - start:
            rows = pa.concat_tables([rows, pa.Table.from_batches([next(remaining)])])
        yield rows.slice(0, end - start)
        rows, start = rows.slice(end - start), end


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
        yield {"shard": shard, "rows": _pack(pa.table(list(zip(*rows)), schema=_TASK_ROWS))}


def _pack(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=_COMPRESSED) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes()


def _unpack(packed: bytes) -> pa.Table:
    with pa.ipc.open_stream(packed) as stream:
        return stream.read_all()


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
    pixels, digests, reasons = _decode(files, images, size)
    decoded = [index for index, digest in enumerate(digests) if digest]
    kept = files.take(pa.array(decoded, pa.int64()))
    rows = _Rows(
        split=task["split"],
        paths=kept["path"],
        labels=kept["label"],
        pixel_sha256=pa.array([digests[i].hex() for i in decoded]),  # type: ignore[union-attr]
        images=pixels,
    )
    count = len(files)
    shard = rows.write(staging, task["shard"]) if decoded else None
    of_rows = [rows.hash(), *rows.moments()]
    if len(decoded) < count:
        positions = np.full(count, -1)
        positions[decoded] = np.arange(len(decoded))
        indices = pa.array(positions, mask=positions < 0)  # null where there is no row
        of_rows = [column.take(indices) for column in of_rows]
    columns = [
        *(_repeat(task["shard"], count), files["path"], _repeat(task["split"], count)),
        *(files["label"], pa.array(reasons, pa.string()), pa.array(digests, pa.binary())),
        *(*of_rows, *_shard_columns(shard, count)),
    ]
    return pa.Table.from_arrays(columns, schema=RESULTS)


def _decode(
    files: pa.Table, images: ImageSource, size: int
) -> tuple[np.ndarray, list[bytes | None], list[str | None]]:
    """Decodes images: (N, size, size) uint8 of those that can be, and two lists for all files.

    The lists have the hash of each image's pixels, or the reason why it cannot be decoded.
    """
    count = len(files)
    digests: list[bytes | None] = [None] * count
    reasons: list[str | None] = [None] * count
    pixels = np.empty((count, size, size), np.uint8)
    num_decoded = 0
    for index, (path, at) in enumerate(zip(files["path"].to_pylist(), files["at"].to_pylist())):
        try:
            grey = images.grey(path, at)
        except (ReadError, decoding.DecodeError) as error:
            reasons[index] = str(error)
            continue
        digests[index] = decoding.pixel_digest(grey)
        pixels[num_decoded] = decoding.fit(grey, size)
        num_decoded += 1
    return pixels[:num_decoded], digests, reasons


def _repeat(value: str | None, count: int) -> pa.Array:
    return pa.repeat(pa.scalar(value, pa.string()), count)


def _shard_columns(shard: FileRecord | None, count: int) -> list[pa.Array]:
    """Size and hash of a shard, once for each row; null where none was written."""
    num_bytes, sha256 = (shard.num_bytes, shard.sha256) if shard else (None, None)
    return [pa.repeat(pa.scalar(num_bytes, pa.int64()), count), _repeat(sha256, count)]


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
    targets = _unpack(task["rows"]).to_pydict()
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
        columns = [_repeat(shard, count), rows.paths, rows.hash(), *_shard_columns(written, count)]
        rewritten.append(pa.Table.from_arrays(columns, schema=REWRITTEN))
    return pa.concat_tables(rewritten)


class _Rows:
    """The rows of one shard."""

    def __init__(
        self,
        *,
        split: str,
        paths: pa.ChunkedArray,
        labels: pa.ChunkedArray,
        pixel_sha256: pa.ChunkedArray | pa.Array,
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
            paths=table["image_id"],
            labels=table["label"],
            pixel_sha256=table["pixel_sha256"],
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
            *(self.paths, _repeat(self.split, count), self.labels),
            *(pixels, side, side, self.pixel_sha256),
        ]
        return write_table(
            pa.Table.from_arrays(columns, schema=dataset.SCHEMA),
            staging,
            shard,
            row_group_size=ROWS_PER_GROUP,
            use_dictionary=["split", "label"],
            write_statistics=["image_id", "split", "label"],
        )

    def hash(self) -> pa.Array:
        """Returns the SHA-256 of each row's id, split, label, shape and pixels."""
        size = self.images.shape[1]
        middle, end = f"\0{self.split}\0", f"\0{size}x{size}:"
        digests = []
        for path, label, image in zip(self.paths.to_pylist(), self.labels.to_pylist(), self.images):
            digest = hashlib.sha256(f"{path}{middle}{label or ''}{end}".encode())
            digest.update(image.data)
            digests.append(digest.digest())
        return pa.array(digests, pa.binary())

    def moments(self) -> list[pa.Array]:
        """Returns for each image the sum of its pixels, and the sum of their squares."""
        count = len(self.images)
        flat = self.images.reshape(count, self.images.shape[1] ** 2)
        sums, squares = np.empty(count, np.int64), np.empty(count, np.int64)
        rows = max(1, _BLOCK_PIXELS // flat.shape[1])
        for start in range(0, count, rows):
            block = flat[start : start + rows]
            sums[start : start + rows] = cv2.reduce(block, 1, cv2.REDUCE_SUM, dtype=cv2.CV_32S)[
                :, 0
            ]
            values = block.astype(np.float64)  # exact: the sums are far below 2**53
            squares[start : start + rows] = np.vecdot(values, values)
        return [pa.array(sums), pa.array(squares)]
