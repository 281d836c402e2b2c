"""Writing a Parquet part from a worker."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fer_ray import storage
from fer_ray.errors import UserError


def write_table(table: pa.Table, staging: str, part: str, **settings: Any) -> None:
    """Writes a part as Parquet.

    Args:
        table: its rows.
        staging: place of the unfinished output.
        part: path of the part in it.
        settings: further arguments of `pyarrow.parquet.write_table`.

    Raises:
        UserError: when this worker does not see the folder.
    """
    fs, path = storage.filesystem(storage.join(staging, part))
    try:
        pq.write_table(table, path, filesystem=fs, compression="zstd", **settings)
    except FileNotFoundError as error:
        raise unseen(storage.parent_of(staging)) from error


def unseen(path: str) -> UserError:
    """Builds the error for an output that workers on other machines do not see."""
    return UserError(
        f"--output: {path} is not seen by every worker: with several machines it has to be on a "
        "shared disk or at a URI"
    )
