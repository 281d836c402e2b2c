"""The contract of predictions: their columns, and the manifest that marks a folder as complete.

``<output>/<run>/<split>/`` holds ``part-*.parquet``, one row an image, and ``_manifest.json``,
which is written last. Readers of many files skip names that start with ``_``, so pandas, pyarrow
and DuckDB read the whole folder. This module reads it only where the manifest exists and agrees
with the files beside it. No other module names these files.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from fer_ray import storage
from fer_ray.data import parquet
from fer_ray.data.json_values import Record
from fer_ray.data.labels import probability_column
from fer_ray.errors import UserError, first_line

MANIFEST = "_manifest.json"
"""The file that is written last."""
_PART = re.compile(r"part-\d+\.parquet")

FORMAT = "fer_ray predictions 1"
"""The manifest's ``format``: another one is refused."""

MAX_PROBABILITY = 1.0 + 1e-5
"""Largest value of a probability: float32 rounds sums to a little above 1."""

_EXPECTED = f"give a folder <run>/<split> with {MANIFEST}, or one or two folders above it"
_DEPTH = 2


def part_name(number: int) -> str:
    """Name of the file with the rows of one part, numbered from 0."""
    return f"part-{number:05d}.parquet"


logger = logging.getLogger(__name__)


def schema(labels: Sequence[str]) -> pa.Schema:
    """The columns of predictions, in their order.

    Args:
        labels: the model's labels, in the order of its outputs.

    Returns:
        An Arrow schema of plain columns, one float32 ``prob_<label>`` a label.
    """
    fields: list[tuple[str, pa.DataType]] = [
        ("image_id", pa.string()),
        ("pixel_sha256", pa.string()),
        ("label", pa.string()),
        ("predicted", pa.string()),
        ("confidence", pa.float32()),
        ("correct", pa.bool_()),
        *((probability_column(label), pa.float32()) for label in labels),
        ("error", pa.string()),
        ("run", pa.string()),
        ("split", pa.string()),
        ("model", pa.string()),
        ("checkpoint", pa.string()),
        ("predicted_at", pa.timestamp("us", tz="UTC")),
    ]
    return pa.schema(fields)


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """One run's predictions on one split, read and checked."""

    run: str
    """The run whose checkpoint predicted."""
    split: str
    """The split, or whatever name the images were predicted under."""
    model: str
    """The model's name."""
    checkpoint: str
    """The hash of the checkpoint's weights and configuration."""
    labels: tuple[str, ...]
    """The model's labels in the order of its outputs."""
    table: pa.Table
    """The rows, with the columns of `schema`; ``image_id`` is unique."""
    manifest: dict[str, Any]
    """The manifest's content: ``rows``, ``files``, ``config`` and the rest."""


def write_manifest(
    folder: str,
    *,
    rows: int,
    files: Sequence[str],
    labels: Sequence[str],
    checkpoint: str,
    config: dict[str, Any],
) -> None:
    """Verifies a folder's part files and then writes the manifest that marks it as complete.

    Args:
        folder: path or URI of the folder with the part files, which may be a staging folder.
        rows: number of images to predict: the files have to hold as many rows.
        files: names of the part files within the folder.
        labels: the model's labels in the order of its outputs.
        checkpoint: the checkpoint's hash.
        config: the resolved configuration, as JSON values.

    Raises:
        RuntimeError: where the files differ from that: another number of rows, other columns, a
            duplicated or missing ``image_id``, more than one run or split, or a Parquet file that
            is not listed. The manifest is then not written.
    """
    try:
        table = _read_files(folder, files, labels, strict=True)
        _check_rows(table, rows, labels)
        constants = {
            name: _constant(table, name) for name in ("run", "split", "model", "checkpoint")
        }
        if constants["checkpoint"] != checkpoint:
            raise UserError(f"rows of checkpoint {constants['checkpoint']!r}, not {checkpoint!r}")
    except UserError as error:
        raise RuntimeError(f"predictions are not complete: {folder}: {error}") from error
    manifest = {
        "format": FORMAT,
        **constants,
        "rows": rows,
        "files": sorted(files),
        "labels": list(labels),
        "config": config,
    }
    storage.write_json(storage.join(folder, MANIFEST), manifest)


def find(path: str) -> list[str]:
    """Finds the folders of predictions at a path.

    Args:
        path: a split's folder, a run's folder, or the folder of all predictions.

    Returns:
        The folders with a manifest, sorted. A folder that has part files but no manifest is left
        out, with a warning in the log that names it.

    Raises:
        UserError: where there is none, or `path` itself has part files but no manifest.
    """
    path = storage.absolute(path)
    if not storage.is_directory(path):
        raise UserError(f"{path}: no such folder; {_EXPECTED}")
    unfinished: list[str] = []
    folders = sorted(_search(path, _DEPTH, unfinished))
    if path in unfinished:
        raise UserError(f"{path}: unfinished, {MANIFEST} is missing: predict again")
    for folder in unfinished:
        logger.warning("%s: left out, since it is unfinished: %s is missing", folder, MANIFEST)
    if not folders:
        raise UserError(f"{path}: no predictions here; {_EXPECTED}")
    return folders


def _search(path: str, depth: int, unfinished: list[str]) -> list[str]:
    names = storage.list_names(path)
    if MANIFEST in names:
        return [path]
    if any(_PART.fullmatch(name) for name in names):
        unfinished.append(path)
        return []
    if depth == 0:
        return []
    below = [storage.join(path, name) for name in names if name[0] not in "._"]
    folders = [folder for folder in below if storage.is_directory(folder)]
    return [path for folder in folders for path in _search(folder, depth - 1, unfinished)]


def read(folder: str) -> Predictions:
    """Reads a folder of predictions and checks it against its manifest.

    Args:
        folder: path or URI of the folder with the manifest and the part files.

    Returns:
        The predictions; columns of equivalent types are cast to those of `schema`.

    Raises:
        UserError: where the manifest is missing or of another format, or the files differ from
            what it records.
    """
    folder = storage.absolute(folder)
    manifest = _read_manifest(folder)
    labels, rows = manifest.texts("labels"), manifest.integer("rows")
    manifest.record("config")
    try:
        table = _read_files(folder, manifest.names("files"), labels, strict=False)
        _check_rows(table, rows, labels)
    except UserError as error:
        raise UserError(
            f"{folder}: the files differ from {MANIFEST}: {error}; predict again"
        ) from error
    return Predictions(
        run=manifest.name("run"),
        split=manifest.name("split"),
        model=manifest.text("model"),
        checkpoint=manifest.text("checkpoint"),
        labels=labels,
        table=table,
        manifest=manifest.value,
    )


def _read_manifest(folder: str) -> Record:
    path = storage.join(folder, MANIFEST)
    try:
        manifest = Record(path, storage.read_json(path), advice="predict again")
    except FileNotFoundError:
        raise UserError(f"{folder}: no {MANIFEST}; {_EXPECTED}") from None
    if manifest.value.get("format") != FORMAT:
        raise UserError(f"{path}: the format is not {FORMAT!r}")
    return manifest


def _read_files(
    folder: str, files: Sequence[str], labels: Sequence[str], *, strict: bool
) -> pa.Table:
    """Reads all rows of the listed files, which have to be all Parquet files of the folder."""
    present = [name for name in storage.list_names(folder) if name.endswith(".parquet")]
    if sorted(files) != present:
        missing, extra = set(files) - set(present), set(present) - set(files)
        raise UserError(f"files missing: {sorted(missing)}, files not listed: {sorted(extra)}")
    columns = schema(labels)
    tables = [
        _read_part(storage.join(folder, name), columns, strict=strict) for name in sorted(files)
    ]
    return pa.concat_tables(tables) if tables else columns.empty_table()


def _read_part(path: str, columns: pa.Schema, *, strict: bool) -> pa.Table:
    """Reads one file; `strict`: types have to be the same, not only equivalent."""
    name = storage.name_of(path)
    table = parquet.parse(storage.read_bytes(path, limit=parquet.MAX_TABLE_BYTES), name)
    if strict and not table.schema.equals(columns):
        raise UserError(f"{name}: columns are {_columns(table.schema)}, not {_columns(columns)}")
    if table.column_names != columns.names:
        raise UserError(f"{name}: columns are {table.column_names}, not {columns.names}")
    try:
        return table.cast(columns)
    except pa.ArrowException as error:
        raise UserError(f"{name}: {first_line(error)}") from error


def _columns(columns: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in columns)


def _check_rows(table: pa.Table, rows: int, labels: Sequence[str]) -> None:
    if table.num_rows != rows:
        raise UserError(f"{table.num_rows:,} rows instead of {rows:,}")
    ids = table["image_id"]
    if ids.null_count:
        raise UserError(f"{ids.null_count:,} rows without image_id")
    if pc.count_distinct(ids).as_py() != rows:
        counts = pc.value_counts(ids).to_pylist()
        duplicates = [pair["values"] for pair in counts if pair["counts"] > 1]
        raise UserError(f"{len(duplicates):,} images more than once, such as {duplicates[0]!r}")
    predicted = table.filter(pc.is_null(table["error"]))
    for name in ("confidence", *map(probability_column, labels)):
        values = predicted[name]
        # a comparison with NaN is false
        allowed = pc.and_(pc.greater_equal(values, 0.0), pc.less_equal(values, MAX_PROBABILITY))
        if wrong := len(values) - (pc.sum(allowed).as_py() or 0):
            raise UserError(f"{name} is no number between 0 and 1 in {wrong:,} rows")


def _constant(table: pa.Table, column: str) -> str:
    """The value of a column that is the same in all rows."""
    values = pc.unique(table[column]).to_pylist()
    if len(values) != 1 or values[0] is None:
        raise UserError(f"{column} has to be the same in all rows, not {values[:3]}")
    return values[0]
