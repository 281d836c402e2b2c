"""From any source to a prepared dataset, the pictures decoded in parallel by Ray Data.

The driver lists the files and cuts them into parts; each Ray task decodes and writes one part
and returns one small row a file, from which the driver counts, finds duplicates and writes
``dataset.json``. No picture passes through the driver, and what is written depends neither on
the number of workers nor on the order in which they finish.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib.metadata
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fer_ray import __version__, dataset, dataset_summary, sources, storage, synthetic
from fer_ray.errors import UserError
from fer_ray.labels import SPLITS
from fer_ray.sources import Layout, Rejected

ROWS_PER_PART = 2048
"""The most rows of a part: parts of equal size keep all CPUs busy."""

ROWS_PER_GROUP = 256
"""The most rows of a row group, the unit in which a stream shuffles."""

BYTES_PER_PART = 64 * 2**20
"""The most pixel bytes of a part: bounds a worker's memory where images are large."""

_PROGRESS_S = 2.0

_RESULT_SCHEMA = pa.schema(
    [
        ("part", pa.string()),
        ("path", pa.string()),  # null: the whole source failed, `reason` says why
        ("split", pa.string()),
        ("label", pa.string()),
        ("reason", pa.string()),  # null: the file became a row
        ("pixel_sha256", pa.string()),
        ("row_sha256", pa.string()),
        ("pixel_sum", pa.int64()),
        ("pixel_sum_squares", pa.int64()),
    ]
)


class Pictures(Protocol):
    """Where the rows come from; sent to workers, so cheap to pickle."""

    def layout(self) -> Layout:
        """The labels, the paths of each split, and the files that are no rows."""

    def grey(self, path: str) -> np.ndarray:
        """One picture, (H, W) uint8; raises `ReadError` or `DecodeError`."""

    def describe(self) -> dict[str, Any]:
        """What ``dataset.json`` says about the source."""


@dataclass(frozen=True, kw_only=True)
class FilePictures:
    """The picture files of a folder or zip."""

    source: sources.Source
    """Where the files are."""
    given: str
    """The place as the user named it."""

    def layout(self) -> Layout:
        """See `Pictures.layout`."""
        return sources.labelled_layout(self.source)

    def grey(self, path: str) -> np.ndarray:
        """See `Pictures.grey`."""
        return dataset.decode(self.source.read(path))

    def describe(self) -> dict[str, Any]:
        """See `Pictures.describe`."""
        return {
            "kind": self.source.kind,
            "path": self.given,
            "sha256": self.source.fingerprint(),
        }


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A preparation whose settings are known to be right. Made by `plan`."""

    pictures: Pictures
    """Where the rows come from."""
    layout: Layout
    """What the source holds."""
    output: str
    """Absolute place of the prepared dataset."""
    image_size: int
    """Height and width of every image, in pixels."""


def plan(
    *,
    source: str,
    output: str,
    image_size: int = 48,
    num_images: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> Plan:
    """Checks the settings and lists the source; needs no Ray.

    Args:
        source: ``synthetic``, or the place of a folder or zip.
        output: place of the prepared dataset.
        image_size: height and width of every image, in pixels.
        num_images: for the synthetic source only; None for its default.
        seed: for the synthetic source.
        overwrite: whether a prepared dataset at `output` may be replaced.

    Raises:
        UserError: for everything about them that is wrong.
    """
    low, high = dataset.MIN_IMAGE_SIZE, dataset.MAX_IMAGE_SIZE
    if not low <= image_size <= high:
        raise UserError(f"--image-size: {image_size} is not between {low} and {high}")
    output = storage.absolute(output)
    _check_output(output, overwrite)
    pictures: Pictures
    if source == "synthetic":
        count = synthetic.NUM_IMAGES if num_images is None else num_images
        pictures = synthetic.SyntheticPictures(seed=seed, num_images=count, size=image_size)
    else:
        if num_images is not None:
            raise UserError("--num-images: only --source synthetic has a choice of how many")
        if source == "kaggle" or source.lower().endswith(".csv"):
            raise UserError(f"--source: {source} is not supported: a folder, .zip or synthetic is")
        _check_apart(storage.absolute(source), output)
        pictures = FilePictures(source=sources.open_source(source), given=source)
    return Plan(pictures=pictures, layout=pictures.layout(), output=output, image_size=image_size)


def _check_output(output: str, overwrite: bool) -> None:
    if storage.exists(output) and not storage.is_directory(output):
        raise UserError(f"--output: {output} is a file")
    if storage.list_names(output):
        if not storage.exists(storage.join(output, dataset.INFO_NAME)):
            raise UserError(
                f"--output: {output} is not empty and not a prepared dataset: "
                "it is never replaced, choose another folder"
            )
        if not overwrite:
            raise UserError(f"--output: {output} exists: --overwrite replaces it")
    if not storage.is_uri(output):
        above = next(path for path in Path(output).parents if path.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise UserError(f"--output: {above} is not a folder that can be written to")


def _check_apart(source: str, output: str) -> None:
    if storage.is_uri(source) or storage.is_uri(output):
        return
    inner, outer = Path(source).resolve(), Path(output).resolve()
    if inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise UserError(f"--output: {output} and --source {source} lie one within the other")


def prepare(plan: Plan, *, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Writes the prepared dataset, whole or not at all; Ray has to be started.

    Args:
        plan: what to do.
        say: receives lines of progress.

    Returns:
        The value of ``dataset.json``.

    Raises:
        UserError: when no train image can be used, or workers write to another disk.
    """
    start = time.monotonic()
    with storage.staged_directory(plan.output) as staging:
        rows = _write_parts(plan, staging, say)
        kept = [row for row in rows if row["reason"] is None]
        if not any(row["split"] == "train" for row in kept):
            reasons = Counter(row["reason"] for row in rows).most_common(1)
            raise UserError(f"--source: no train image can be used: {reasons[0][0]}")
        _verify_parts(staging, kept, plan.output)
        rejected = [
            Rejected(path=row["path"], reason=row["reason"]) for row in rows if row["reason"]
        ]
        rejected = sorted([*rejected, *plan.layout.rejected])
        _write_quarantine(staging, rejected)
        info = _summarize(plan, kept, len(rejected))
        storage.write_json(storage.join(staging, dataset.INFO_NAME), info)
    for line in dataset_summary.describe(info, rejected):
        say(line)
    say(f"{len(kept):,} images in {time.monotonic() - start:.1f} s")
    return info


def _write_parts(plan: Plan, staging: str, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Lets Ray Data write every part; returns one row a file, ordered by split and path."""
    import ray

    quiet_ray_data()
    tasks = list(_tasks(plan.layout, plan.image_size))
    for split in {task["split"] for task in tasks}:
        storage.make_directory(storage.join(staging, split))
    write = functools.partial(
        _write_part, pictures=plan.pictures, staging=staging, size=plan.image_size
    )
    results = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
        write, batch_size=1, batch_format="pyarrow"
    )
    total = sum(len(task["paths"]) for task in tasks)
    rows: list[dict[str, Any]] = []
    said = start = time.monotonic()
    for batch in results.iter_batches(batch_size=None, batch_format="pyarrow"):
        assert isinstance(batch, pa.Table)
        rows.extend(batch.to_pylist())
        if rows[-1]["path"] is None:
            raise UserError(rows[-1]["reason"])
        if time.monotonic() - said >= _PROGRESS_S or len(rows) == total:
            said = time.monotonic()
            say(f"{len(rows):,} of {total:,} images, {said - start:.0f} s")
    assert len(rows) == total, f"{len(rows)} results for {total} files"
    return sorted(rows, key=lambda row: (row["split"], row["path"]))


def _tasks(layout: Layout, image_size: int) -> Iterator[dict[str, Any]]:
    """Cuts each split, ordered by path, into parts of nearly equal length."""
    most = max(1, min(ROWS_PER_PART, BYTES_PER_PART // image_size**2))
    for split in SPLITS:
        rows = sorted(layout.splits.get(split, []))
        count = math.ceil(len(rows) / most)
        for number in range(count):
            begin, end = len(rows) * number // count, len(rows) * (number + 1) // count
            yield {
                "part": f"{split}/part-{number:05d}.parquet",
                "split": split,
                "paths": [path for path, _ in rows[begin:end]],
                # "" for an unknown label: a list of nothing but nulls has no Arrow type
                "labels": [label or "" for _, label in rows[begin:end]],
            }


def _write_part(batch: pa.Table, *, pictures: Pictures, staging: str, size: int) -> pa.Table:
    """Decodes and writes one part, in a worker.

    Args:
        batch: one task of `_tasks`.
        pictures: where the rows come from.
        staging: place of the unfinished dataset.
        size: height and width of the images.

    Returns:
        One row a file, without the pixels; a single one without a path when the source failed.
    """
    cv2.setNumThreads(1)  # Ray runs one task a CPU: more threads would only compete
    (task,) = batch.to_pylist()
    rows, results = [], []
    for path, label in zip(task["paths"], task["labels"]):
        result = {"part": task["part"], "path": path, "split": task["split"]}
        result["label"] = label or None
        try:
            grey = pictures.grey(path)
        except (sources.ReadError, dataset.DecodeError) as error:
            results.append(result | {"reason": str(error)})
            continue
        except UserError as error:  # as a value: Ray buries exceptions in pages of its own
            failure = {"part": task["part"], "reason": str(error)}
            return pa.Table.from_pylist([failure], _RESULT_SCHEMA)
        row, measures = _row(result, grey, size)
        rows.append(row)
        results.append(result | measures)
    if rows:
        _write_rows(rows, storage.join(staging, task["part"]))
    return pa.Table.from_pylist(results, _RESULT_SCHEMA)


def _write_rows(rows: list[dict[str, Any]], place: str) -> None:
    fs, path = storage.filesystem(place)
    pq.write_table(
        pa.Table.from_pylist(rows, dataset.SCHEMA),
        path,
        filesystem=fs,
        compression="zstd",
        row_group_size=ROWS_PER_GROUP,
        use_dictionary=["split", "label"],
        write_statistics=["image_id", "split", "label"],
    )


def _row(result: dict[str, Any], grey: np.ndarray, size: int) -> tuple[dict, dict]:
    """A row of the dataset, and what the driver wants to know about it."""
    image = dataset.fit(grey, size)
    pixels = image.tobytes()
    name = f"{result['path']}\0{result['split']}\0{result['label'] or ''}\0{size}x{size}:"
    picture = dataset.pixel_sha256(grey)
    flat = image.ravel().astype(np.int64)
    row = {
        "image_id": result["path"],
        "split": result["split"],
        "label": result["label"],
        "image": pixels,
        "height": size,
        "width": size,
        "pixel_sha256": picture,
    }
    measures = {
        "pixel_sha256": picture,
        "row_sha256": hashlib.sha256(name.encode() + pixels).hexdigest(),
        "pixel_sum": int(flat.sum()),
        "pixel_sum_squares": int(flat @ flat),
    }
    return row, measures


def _verify_parts(staging: str, kept: list[dict[str, Any]], output: str) -> None:
    """Checks that every part is there and holds as many rows as its worker said."""
    fs, root = storage.filesystem(staging)
    for part, count in Counter(row["part"] for row in kept).items():
        try:
            found = pq.read_metadata(storage.join(root, part), filesystem=fs).num_rows
        except FileNotFoundError as error:
            raise UserError(
                f"--output: {output} is not seen by every worker: with several machines it has "
                "to be a shared disk or a URI"
            ) from error
        assert found == count, f"{part} has {found} rows, {count} were written"
    assert len({row["path"] for row in kept}) == len(kept), "image ids are not unique"


def _write_quarantine(staging: str, rejected: list[Rejected]) -> None:
    fs, root = storage.filesystem(staging)
    rows = [{"path": file.path, "reason": file.reason} for file in rejected]
    table = pa.Table.from_pylist(rows, dataset.QUARANTINE_SCHEMA)
    pq.write_table(table, storage.join(root, dataset.QUARANTINE_NAME), filesystem=fs)


def _summarize(plan: Plan, kept: list[dict[str, Any]], quarantined: int) -> dict[str, Any]:
    """The value of ``dataset.json``."""
    mean, std = dataset_summary.pixel_moments(kept, plan.image_size)
    packages = {"ray": "ray", "pyarrow": "pyarrow", "pillow": "pillow", "numpy": "numpy"}
    return {
        "format": dataset.FORMAT,
        "labels": list(plan.layout.labels),
        "image_size": plan.image_size,
        "source": plan.pictures.describe(),
        "splits": dataset_summary.count_splits(plan.layout.labels, kept),
        "pixel_mean": mean,
        "pixel_std": std,
        "quarantined": quarantined,
        "duplicates": dataset_summary.find_duplicates(kept),
        "data_sha256": dataset_summary.hash_rows(kept),
        "versions": {
            "fer_ray": __version__,
            **{name: importlib.metadata.version(package) for name, package in packages.items()},
        },
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def quiet_ray_data() -> None:
    """Turns off Ray Data's bars and notes: jobs print their own progress."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # says as a warning that the bars are off
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
