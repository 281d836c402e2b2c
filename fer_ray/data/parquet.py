"""Writing Parquet shards from workers."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fer_ray import storage
from fer_ray.errors import UserError


def write_table(table: pa.Table, staging: str, shard: str, **settings: Any) -> None:
    """Writes one shard as a Parquet file, compressed with zstd.

    Args:
        table: the rows.
        staging: absolute path or URI of the unfinished output.
        shard: path of the file within `staging`; its folder has to exist.
        settings: further arguments of `pyarrow.parquet.write_table`.

    Raises:
        UserError: when the folder does not exist on this machine.
    """
    fs, path = storage.filesystem(storage.join(staging, shard))
    try:
        pq.write_table(table, path, filesystem=fs, compression="zstd", **settings)
    except FileNotFoundError as error:
        raise output_not_shared_error(storage.parent_of(staging)) from error


def output_not_shared_error(path: str) -> UserError:
    """Builds the error for an output folder that some workers cannot access."""
    return UserError(
        f"--output: not every worker can access {path}: on several machines, use a shared disk "
        "or a URI"
    )
