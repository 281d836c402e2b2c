"""Writing Parquet shards from workers, and reading Parquet files that may be damaged."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fer_ray import storage
from fer_ray.data.integrity import FileRecord
from fer_ray.data.json_values import damaged
from fer_ray.errors import UserError, first_line

MAX_TABLE_BYTES = 4 * 2**30
"""Largest size, uncompressed, that a file may declare and is read whole."""

ERRORS = (pa.ArrowException, OSError, ValueError, OverflowError)
"""What pyarrow raises for files that are no Parquet, or damaged."""


def write_table(table: pa.Table, staging: str, shard: str, **settings: Any) -> FileRecord:
    """Writes one shard as a Parquet file, compressed with zstd.

    Args:
        table: the rows; the whole file is in memory for a moment.
        staging: absolute path or URI of the unfinished output.
        shard: path of the file within `staging`; its folder has to exist.
        settings: further arguments of `pyarrow.parquet.write_table`.

    Returns:
        Size and hash of the file, of the bytes that were to be written.

    Raises:
        UserError: when the folder does not exist on this machine.
    """
    fs, path = storage.filesystem(storage.join(staging, shard))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", **settings)
    content = sink.getvalue()
    try:
        with fs.open_output_stream(path) as stream:
            stream.write(content)
    except FileNotFoundError as error:
        raise output_not_shared_error(storage.parent_of(staging)) from error
    return FileRecord.of(content)


def parse(
    content: bytes | pa.Buffer, path: str, *, columns: pa.Schema | None = None, advice: str = ""
) -> pa.Table:
    """The table of a Parquet file's content.

    Args:
        content: the file, whole.
        path: its path, for messages.
        columns: the names and types that it has to have; None: any.
        advice: what to do about a damaged file; the end of messages.

    Raises:
        UserError: where it is no Parquet, is damaged, has other columns, or declares more than
            `MAX_TABLE_BYTES`.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(content))
        check_metadata(file.metadata, path, columns=columns, advice=advice)
        table = file.read()
        table.validate(full=True)  # that texts are UTF-8, too
    except UserError:
        raise
    except ERRORS as error:
        raise damaged(path, f"it cannot be read as Parquet: {first_line(error)}", advice) from error
    return table


def check_metadata(
    metadata: pq.FileMetaData, path: str, *, columns: pa.Schema | None, advice: str = ""
) -> None:
    """Checks the columns and the size that a file's footer declares, as `parse` does.

    Raises:
        UserError: for other columns, or more than `MAX_TABLE_BYTES`.
    """
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    size = sum(group.total_byte_size for group in groups)
    if not 0 <= size <= MAX_TABLE_BYTES:
        raise damaged(path, f"{size:,} bytes uncompressed", advice)
    if columns is None:
        return
    present = metadata.schema.to_arrow_schema()
    if [(f.name, f.type) for f in present] != [(f.name, f.type) for f in columns]:
        raise damaged(path, f"columns are {_columns(present)}, not {_columns(columns)}", advice)


def _columns(columns: pa.Schema) -> str:
    text = ", ".join(f"{field.name} {field.type}" for field in columns)
    return text if len(text) <= 400 else f"{text[:400]}…"


def output_not_shared_error(path: str) -> UserError:
    """Builds the error for an output folder that some workers cannot access."""
    return UserError(
        f"--output: not every worker can access {path}: on several machines, use a shared disk "
        "or a URI"
    )
