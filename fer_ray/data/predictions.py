"""The contract of predictions: their columns, and the manifest that makes a folder trusted.

``<output>/<run>/<split>/`` holds ``part-*.parquet``, one row an image, and ``_manifest.json``,
which is written last. Readers of many files skip names that start with ``_``, so the folder
reads whole with pandas, pyarrow and DuckDB; this module reads it only where the manifest is
there and agrees with the files beside it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fer_ray import storage
from fer_ray.data.labels import probability_column
from fer_ray.errors import UserError

MANIFEST = "_manifest.json"
"""The file that is written last."""

FORMAT = "fer_ray predictions 1"
"""The manifest's ``format``: another one is refused."""

_EXPECTED = f"expected a folder <run>/<split> with {MANIFEST}, or one or two folders above it"
_DEPTH = 2

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
    """What the manifest says: ``rows``, ``files``, ``config`` and the rest."""


def write_manifest(
    folder: str,
    *,
    rows: int,
    files: Sequence[str],
    labels: Sequence[str],
    checkpoint: str,
    config: dict[str, Any],
) -> None:
    """Verifies a folder's part files and then writes the manifest that makes it trusted.

    Args:
        folder: place that holds the part files, possibly still a staging folder.
        rows: how many images were to be predicted: the files have to hold as many.
        files: names of the part files within the folder.
        labels: the model's labels in the order of its outputs.
        checkpoint: the checkpoint's hash.
        config: the resolved configuration, as JSON values.

    Raises:
        RuntimeError: when the files do not hold exactly that: another number of rows, other
            columns, an ``image_id`` twice or missing, more than one run or split, a Parquet
            file that is not listed. The manifest is then not written.
    """
    try:
        table = _read_files(folder, files, labels, strict=True)
        _check_rows(table, rows)
        only = {name: _only(table, name) for name in ("run", "split", "model", "checkpoint")}
        if only["checkpoint"] != checkpoint:
            raise UserError(f"rows of checkpoint {only['checkpoint']!r}, not {checkpoint!r}")
    except UserError as error:
        raise RuntimeError(f"predictions are not complete: {folder}: {error}") from error
    manifest = {
        "format": FORMAT,
        **only,
        "rows": rows,
        "files": sorted(files),
        "labels": list(labels),
        "config": config,
    }
    storage.write_json(storage.join(folder, MANIFEST), manifest)


def find(path: str) -> list[str]:
    """The folders of predictions at a place.

    Args:
        path: a split's folder, a run's folder, or the folder of all predictions.

    Returns:
        The folders with a manifest, sorted. One that has part files but no manifest is left
        out with a warning in the log that names it.

    Raises:
        UserError: when there is none, or `place` itself has part files but no manifest.
    """
    path = storage.absolute(path)
    if not storage.is_directory(path):
        raise UserError(f"{path}: no such folder; {_EXPECTED}")
    unfinished: list[str] = []
    found = sorted(_search(path, _DEPTH, unfinished))
    if path in unfinished:
        raise UserError(f"{path}: part files without {MANIFEST}: unfinished, predict again")
    for folder in unfinished:
        logger.warning("%s: left out: part files without %s, unfinished", folder, MANIFEST)
    if not found:
        raise UserError(f"{path}: no predictions here; {_EXPECTED}")
    return found


def _search(path: str, depth: int, unfinished: list[str]) -> list[str]:
    names = storage.list_names(path)
    if MANIFEST in names:
        return [path]
    if any(_is_part(name) for name in names):
        unfinished.append(path)
        return []
    if depth == 0:
        return []
    below = [storage.join(path, name) for name in names if name[0] not in "._"]
    folders = [folder for folder in below if storage.is_directory(folder)]
    return [hit for folder in folders for hit in _search(folder, depth - 1, unfinished)]


def read(folder: str) -> Predictions:
    """Reads a folder of predictions and checks it against its manifest.

    Args:
        folder: place with the manifest and the part files.

    Returns:
        The predictions; columns of equivalent types are cast to those of `schema`.

    Raises:
        UserError: when the manifest is missing or not of this format, or when the files hold
            anything else than it says.
    """
    folder = storage.absolute(folder)
    manifest = _read_manifest(folder)
    try:
        table = _read_files(folder, manifest["files"], manifest["labels"], strict=False)
        _check_rows(table, manifest["rows"])
    except UserError as error:
        raise UserError(f"{folder}: not as {MANIFEST} says: {error}") from error
    return Predictions(
        run=manifest["run"],
        split=manifest["split"],
        model=manifest["model"],
        checkpoint=manifest["checkpoint"],
        labels=tuple(manifest["labels"]),
        table=table,
        manifest=manifest,
    )


def _read_manifest(folder: str) -> dict[str, Any]:
    path = storage.join(folder, MANIFEST)
    try:
        manifest = storage.read_json(path)
    except FileNotFoundError:
        raise UserError(f"{folder}: no {MANIFEST}; {_EXPECTED}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path}: the format is not {FORMAT!r}")
    needed = ("run", "split", "model", "checkpoint", "rows", "files", "labels", "config")
    missing = [key for key in needed if key not in manifest]
    if missing:
        raise UserError(f"{path}: {', '.join(missing)} missing")
    return manifest


def _read_files(
    folder: str, files: Sequence[str], labels: Sequence[str], *, strict: bool
) -> pa.Table:
    """All rows of the listed files, which have to be all Parquet files of the folder."""
    present = [name for name in storage.list_names(folder) if name.endswith(".parquet")]
    if sorted(files) != present:
        missing, extra = set(files) - set(present), set(present) - set(files)
        raise UserError(f"files missing: {sorted(missing)}, files not listed: {sorted(extra)}")
    wanted = schema(labels)
    tables = [
        _read_part(storage.join(folder, name), wanted, strict=strict) for name in sorted(files)
    ]
    return pa.concat_tables(tables) if tables else wanted.empty_table()


def _read_part(path: str, wanted: pa.Schema, *, strict: bool) -> pa.Table:
    fs, inner = storage.filesystem(path)
    name = storage.name_of(path)
    try:
        # One stream and not `read_table(path)`, which would take `run=x` in a folder's name
        # for a partition and add a column.
        with fs.open_input_file(inner) as stream:
            table = pq.ParquetFile(stream).read()
    except pa.ArrowException as error:
        raise UserError(f"{name} is not readable as Parquet: {error}".splitlines()[0]) from error
    if strict and not table.schema.equals(wanted):
        raise UserError(f"{name}: columns are {_columns(table.schema)}, not {_columns(wanted)}")
    if table.column_names != wanted.names:
        raise UserError(f"{name}: columns are {table.column_names}, not {wanted.names}")
    try:
        return table.cast(wanted)
    except pa.ArrowException as error:
        raise UserError(f"{name}: {error}".splitlines()[0]) from error


def _columns(columns: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in columns)


def _check_rows(table: pa.Table, rows: int) -> None:
    if table.num_rows != rows:
        raise UserError(f"{table.num_rows:,} rows and not {rows:,}")
    ids = table["image_id"]
    if ids.null_count:
        raise UserError(f"{ids.null_count:,} rows without image_id")
    if pc.count_distinct(ids).as_py() != rows:
        twice = [pair["values"] for pair in pc.value_counts(ids).to_pylist() if pair["counts"] > 1]
        raise UserError(f"{len(twice):,} images more than once, such as {twice[0]!r}")


def _only(table: pa.Table, column: str) -> str:
    values = pc.unique(table[column]).to_pylist()
    if len(values) != 1 or values[0] is None:
        raise UserError(f"{column} has to be one value in all rows, not {values[:3]}")
    return values[0]


def _is_part(name: str) -> bool:
    return name.startswith("part-") and name.endswith(".parquet")
