"""What workers do in a preparation: decode and write a part, then move some of its rows."""

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
from fer_ray.data.image_source import Pictures
from fer_ray.data.labels import SPLITS
from fer_ray.data.parquet import unseen, write_table
from fer_ray.data.sources import ReadError
from fer_ray.preparation.inventory import RESULTS, Ledger

ROWS_PER_PART = 2048
"""The most rows of a part: parts of equal size keep all CPUs busy."""

MANY_PARTS = 64
"""From so many on, parts are twice as long: Ray keeps account of each task in memory."""

ROWS_PER_GROUP = 256
"""The most rows of a row group, the unit in which a stream shuffles."""

BYTES_PER_PART = 64 * 2**20
"""The most pixel bytes of a part: bounds a worker's memory where images are large."""

_PACKED = pa.ipc.IpcWriteOptions(compression="zstd")

_TASK_FILES = pa.schema([("path", pa.string()), ("label", pa.string()), ("at", pa.binary())])
_TASK_MOVES = pa.schema([("path", pa.string()), ("split", pa.string())])
MOVED = pa.schema([("part", pa.string()), ("path", pa.string()), ("row_sha256", pa.binary())])
"""What `move_rows` says of each row: where it is now."""


# ------------------------------------------------------------------ what there is to do


def write_tasks(ledger: Ledger, image_size: int) -> Iterator[dict[str, Any]]:
    """Cuts each split, ordered by path, into parts of nearly equal length.

    The files of a part are packed: all tasks of a large source are in memory at once.
    """
    counts = ledger.counts()
    rows_per_part = ROWS_PER_PART
    if sum(counts.values()) > MANY_PARTS * ROWS_PER_PART:
        rows_per_part *= 2
    most = max(1, min(rows_per_part, BYTES_PER_PART // image_size**2))
    for split, total in counts.items():
        rows = ledger.rows(
            'SELECT path, label, "at" FROM listed WHERE reason IS NULL AND split = ? ORDER BY path',
            split,
        )
        count = -(-total // most)
        for number in range(count):
            length = total * (number + 1) // count - total * number // count
            files = [next(rows) for _ in range(length)]
            part = f"{split}/part-{number:05d}.parquet"
            yield {"part": part, "split": split, "files": _pack(files, _TASK_FILES)}


def move_tasks(ledger: Ledger) -> Iterator[dict[str, Any]]:
    """The parts that hold a row which belongs to another split, or to none any more."""
    changed = ledger.rows(
        "SELECT part FROM results WHERE pixel_sha256 IS NOT NULL GROUP BY part "
        "HAVING bool_or(reason IS NOT NULL OR split <> split_part(part, '/', 1)) ORDER BY part"
    )
    for (part,) in changed:
        rows = ledger.rows(
            "SELECT path, CASE WHEN reason IS NULL THEN split END FROM results "
            "WHERE part = ? AND pixel_sha256 IS NOT NULL ORDER BY path",
            part,
        )
        yield {"part": part, "rows": _pack(rows, _TASK_MOVES)}


def _pack(rows: Iterable[tuple[Any, ...]], schema: pa.Schema) -> bytes:
    columns = list(zip(*rows))
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema)]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema, options=_PACKED) as stream:
        stream.write_table(pa.Table.from_arrays(arrays, schema=schema))
    return sink.getvalue().to_pybytes()


def _unpack(packed: bytes) -> dict[str, list[Any]]:
    with pa.ipc.open_stream(packed) as stream:
        return stream.read_all().to_pydict()


# ------------------------------------------------------------------ in the workers


def write_part(batch: pa.Table, *, pictures: Pictures, staging: str, size: int) -> pa.Table:
    """Decodes and writes one part.

    Args:
        batch: one task of `write_tasks`.
        pictures: where the rows come from.
        staging: place of the unfinished dataset.
        size: height and width of the images.

    Returns:
        One row a file, as in `RESULTS`.

    Raises:
        UserError: when the whole source is not there, or the folder to write into.
        OSError: when the part cannot be written for another reason.
    """
    cv2.setNumThreads(1)  # Ray runs one task a CPU: more threads would only compete
    (task,) = batch.to_pylist()
    files = _unpack(task["files"])
    count = len(files["path"])
    reasons: list[str | None] = [None] * count
    hashes: list[bytes | None] = [None] * count
    images = np.empty((count, size, size), np.uint8)
    kept: list[int] = []
    for index, (path, at) in enumerate(zip(files["path"], files["at"])):
        try:
            grey = pictures.grey(path, at)
        except (ReadError, decoding.DecodeError) as error:
            reasons[index] = str(error)
            continue
        hashes[index] = decoding.pixel_digest(grey)
        images[len(kept)] = decoding.fit(grey, size)
        kept.append(index)
    rows = _Rows(
        split=task["split"],
        paths=[files["path"][i] for i in kept],
        labels=[files["label"][i] for i in kept],
        pictures=[hashes[i].hex() for i in kept],  # type: ignore[union-attr]
        images=images[: len(kept)],
    )
    if kept:
        rows.write(staging, task["part"])
    return _results(task, files, reasons, hashes, kept, rows)


def _results(
    task: dict[str, Any],
    files: dict[str, list[Any]],
    reasons: list[str | None],
    hashes: list[bytes | None],
    kept: list[int],
    rows: _Rows,
) -> pa.Table:
    count = len(reasons)
    sums: list[Any] = [None] * count
    squares, digests = list(sums), list(sums)
    for index, (total, squared), digest in zip(kept, rows.moments(), rows.hash()):
        sums[index], squares[index], digests[index] = total, squared, digest
    columns = [
        *([task["part"]] * count, files["path"], [task["split"]] * count, files["label"]),
        *(reasons, hashes, digests, sums, squares),
    ]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, RESULTS)]
    return pa.Table.from_arrays(arrays, schema=RESULTS)


def move_rows(batch: pa.Table, *, staging: str) -> pa.Table:
    """Gives each row of a part to the split where it belongs, and drops the others.

    Args:
        batch: one task of `move_tasks`.
        staging: place of the unfinished dataset.

    Returns:
        One row for each that is left: `path`, `part` and `row_sha256`.

    Raises:
        UserError: when this worker does not see the part.
        OSError: when it cannot be read or written for another reason.
    """
    (task,) = batch.to_pylist()
    targets = _unpack(task["rows"])
    fs, path = storage.filesystem(storage.join(staging, task["part"]))
    try:
        table = pq.read_table(path, filesystem=fs, partitioning=None)
    except FileNotFoundError as error:
        raise unseen(storage.parent_of(staging)) from error
    assert table["image_id"].to_pylist() == targets["path"], f"{task['part']} holds other rows"
    # under another name, and the old part stays: a task that Ray runs again finds it
    name = task["part"].split("/", 1)[1].replace(".parquet", "-settled.parquet")
    moved = [MOVED.empty_table()]
    for split in SPLITS:
        chosen = [index for index, target in enumerate(targets["split"]) if target == split]
        if not chosen:
            continue
        rows = _Rows.of(table.take(chosen), split)
        part = f"{split}/{name}"
        rows.write(staging, part)
        columns = [[part] * len(chosen), rows.paths, rows.hash()]
        moved.append(pa.table(columns, schema=MOVED))
    return pa.concat_tables(moved)


class _Rows:
    """Rows of one part."""

    def __init__(
        self,
        *,
        split: str,
        paths: list[str],
        labels: list[str | None],
        pictures: list[str],
        images: np.ndarray,
    ) -> None:
        self.split, self.paths, self.labels = split, paths, labels
        self.pictures, self.images = pictures, images

    @classmethod
    def of(cls, table: pa.Table, split: str) -> _Rows:
        """Those of a table of the dataset, as rows of another split."""
        size = table["height"][0].as_py()
        return cls(
            split=split,
            paths=table["image_id"].to_pylist(),
            labels=table["label"].to_pylist(),
            pictures=table["pixel_sha256"].to_pylist(),
            images=dataset.stack(table["image"], size),
        )

    def write(self, staging: str, part: str) -> None:
        """Writes them as a Parquet file."""
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
            *(pixels, side, side, pa.array(self.pictures, pa.string())),
        ]
        write_table(
            pa.Table.from_arrays(columns, schema=dataset.SCHEMA),
            staging,
            part,
            row_group_size=ROWS_PER_GROUP,
            use_dictionary=["split", "label"],
            write_statistics=["image_id", "split", "label"],
        )

    def hash(self) -> list[bytes]:
        """SHA-256 of each row: id, split, label, shape and pixels."""
        size = self.images.shape[1]
        end = f"{size}x{size}:"
        return [
            hashlib.sha256(
                f"{path}\0{self.split}\0{label or ''}\0{end}".encode() + image.tobytes()
            ).digest()
            for path, label, image in zip(self.paths, self.labels, self.images)
        ]

    def moments(self) -> list[list[int]]:
        """The sum of each image's pixels, and that of their squares."""
        # rounded: OpenCV squares a root
        return [
            [int(cv2.sumElems(image)[0]), round(cv2.norm(image, cv2.NORM_L2SQR))]
            for image in self.images
        ]
