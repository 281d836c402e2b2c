"""The history of a run: one row for each epoch, derived from the checkpoint that carries it."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fer_ray import storage
from fer_ray.data import parquet
from fer_ray.errors import UserError

SPLITS = ("train", "validation")

METRICS = tuple(f"{split}_{name}" for split in SPLITS for name in ("loss", "accuracy", "macro_f1"))
"""The metrics that every history has."""

SCHEMA = pa.schema(
    [
        pa.field("epoch", pa.int32(), nullable=False),
        *(pa.field(name, pa.float64(), nullable=False) for name in METRICS),
        pa.field("learning_rate", pa.float64(), nullable=False),
        pa.field("images_per_s", pa.float64(), nullable=False),
        pa.field("seconds", pa.float64(), nullable=False),
        pa.field("ended_at", pa.timestamp("ms", tz="UTC")),
    ]
)
"""The columns of every ``history.parquet``."""

MAX_BYTES = 64 * 2**20
"""Largest ``history.parquet`` that is read."""

_REQUIRED = ("epoch", "images_per_s", "seconds")


def added_metrics(names: Iterable[str]) -> list[str]:
    """The columns of further registered metrics.

    Args:
        names: keys of a history's rows, in any number of repetitions.

    Returns:
        Those that begin with a split and are not in `METRICS`, each once, in their order.
    """
    prefixes = tuple(f"{split}_" for split in SPLITS)
    return list(
        dict.fromkeys(name for name in names if name.startswith(prefixes) and name not in METRICS)
    )


def schema(names: Iterable[str]) -> pa.Schema:
    """The columns of a ``history.parquet``: `SCHEMA`, then those of further metrics.

    Args:
        names: keys of its rows. Further metrics are null in epochs that were trained before the
            metric was registered.
    """
    return pa.schema([*SCHEMA, *((name, pa.float64()) for name in added_metrics(names))])


def write_history(path: str, rows: Sequence[dict[str, Any]]) -> None:
    """Writes ``history.parquet`` as a whole: rows are never duplicated or lost.

    Args:
        path: of the file.
        rows: as checkpoints hold them; ``ended_at`` in ISO 8601, absent in checkpoints of
            versions that did not record it.
    """
    columns = schema(name for row in rows for name in row)
    values = [{**row, "ended_at": _datetime(row.get("ended_at"))} for row in rows]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(values, schema=columns), sink)
    storage.write_bytes(path, sink.getvalue().to_pybytes())


def read_history(path: str) -> pa.Table:
    """Reads a ``history.parquet`` of this or an earlier version, with whatever metrics it has.

    Raises:
        UserError: where the file is no Parquet, or lacks the epoch or its duration.
    """
    table = parquet.parse(storage.read_bytes(path, limit=MAX_BYTES), path)
    missing = [name for name in _REQUIRED if name not in table.column_names]
    if missing:
        raise UserError(f"{path}: not a training history: no column {', '.join(missing)}")
    return table


def _datetime(text: str | None) -> datetime.datetime | None:
    return datetime.datetime.fromisoformat(text) if text else None
