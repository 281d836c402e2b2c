"""The history of a run: one row an epoch, derived from the checkpoint that carries it."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fer_ray import storage

SCHEMA = pa.schema(
    [
        pa.field("epoch", pa.int32(), nullable=False),
        *(
            pa.field(f"{split}_{metric}", pa.float64(), nullable=False)
            for split in ("train", "validation")
            for metric in ("loss", "accuracy", "macro_f1")
        ),
        pa.field("learning_rate", pa.float64(), nullable=False),
        pa.field("images_per_s", pa.float64(), nullable=False),
        pa.field("seconds", pa.float64(), nullable=False),
        pa.field("ended_at", pa.timestamp("ms", tz="UTC")),
    ]
)
"""The columns of ``history.parquet``."""


def write_history(path: str, rows: Sequence[dict[str, Any]]) -> None:
    """Writes ``history.parquet`` whole: a row that is there twice or missing cannot come about.

    Args:
        path: of the file.
        rows: as checkpoints hold them; ``ended_at`` in ISO 8601, and not in those of before it was
            kept.
    """
    moments = [{**row, "ended_at": _moment(row.get("ended_at"))} for row in rows]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(moments, schema=SCHEMA), sink)
    storage.write_bytes(path, sink.getvalue().to_pybytes())


def _moment(text: str | None) -> datetime.datetime | None:
    return datetime.datetime.fromisoformat(text) if text else None
