"""The inventory of a preparation: every file of the source, and what became of it.

It is a DuckDB database, which keeps what exceeds a few dozen megabytes in a temporary folder, so
that the driver's memory does not grow with the number of images. It also does the grouping and
sorting.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from fer_ray import storage
from fer_ray.data.labels import SPLITS
from fer_ray.data.sources.files import ENTRIES, RELABELLED, REPEATED, Entry, tables_of

_MEMORY = "48MiB"
"""Memory limit of DuckDB; the rest of the tables is on disk."""
_BATCH = 8192

LISTED = pa.schema([("number", pa.int64()), *ENTRIES])
"""Columns of the table ``listed``: one row for each file of the source, numbered from 0.

A file with a `reason` is not decoded.
"""

RESULTS = pa.schema(
    [
        ("shard", pa.string()),
        ("path", pa.string()),
        ("split", pa.string()),
        ("label", pa.string()),
        ("reason", pa.string()),
        ("pixel_sha256", pa.binary()),
        ("row_sha256", pa.binary()),
        ("pixel_sum", pa.int64()),
        ("pixel_sum_squares", pa.int64()),
        ("shard_bytes", pa.int64()),
        ("shard_sha256", pa.string()),
    ]
)
"""Columns of the table ``results``: one row for each file that a worker has tried to decode.

`reason` is null where the file is an image of the dataset; `shard` is the file that holds it (with
its size and hash in every row), and `split` the split that it shall belong to.
"""

KEPT = "results WHERE reason IS NULL"
"""The images of the dataset, for queries."""


REJECTED = (
    "SELECT path, reason FROM listed WHERE reason IS NOT NULL UNION ALL "
    "SELECT path, reason FROM results WHERE reason IS NOT NULL"
)
"""Query for every file that is not in the dataset, and the reason."""


class Inventory:
    """A database with two tables: ``listed`` (`LISTED`) and ``results`` (`RESULTS`)."""

    def __init__(self) -> None:
        """Creates an empty one; it has to be closed."""
        self._resources = contextlib.ExitStack()
        parent = Path(tempfile.gettempdir())
        folder = self._resources.enter_context(
            storage.claimed_directory(parent, f"fer_ray-inventory-{os.getuid()}-")
        )
        self._connection = duckdb.connect(
            # a database in a file would wait for the disk after each table that is added
            ":memory:",
            config={
                "memory_limit": _MEMORY,
                "threads": 1,
                "preserve_insertion_order": False,
                "temp_directory": str(folder),
            },
        )
        for name, schema in (("listed", LISTED), ("results", RESULTS)):
            self.insert(f"CREATE TABLE {name} AS SELECT * FROM new_rows", schema.empty_table())

    def close(self) -> None:
        """Closes and deletes the database."""
        self._connection.close()
        self._resources.close()

    def add_files(self, entries: Iterable[Entry]) -> None:
        """Adds the files of a source, as `add_tables` does."""
        self.add_tables(tables_of(entries))

    def add_tables(self, tables: Iterable[pa.Table]) -> None:
        """Adds the files of a source; of equal paths, only the first keeps its split and label.

        Args:
            tables: with the columns of `ENTRIES`.
        """
        first = 0
        for table in tables:
            numbers = pa.array(np.arange(first, first + len(table)))
            first += len(table)
            rows = pa.table([numbers, *table.columns], schema=LISTED)
            self.insert("INSERT INTO listed SELECT * FROM new_rows", rows)
        repeated = self.rows(
            "SELECT 1 FROM listed WHERE reason IS NULL GROUP BY path HAVING count(*) > 1 LIMIT 1"
        )
        if list(repeated):
            self._refuse_repeated()

    def _refuse_repeated(self) -> None:
        """Sets the reason of all but the first of equal paths."""
        self.execute(
            "UPDATE listed SET reason = CASE WHEN again.same THEN ? ELSE ? END FROM ("
            "  SELECT * FROM (SELECT number, row_number() OVER (PARTITION BY path ORDER BY number)"
            "  AS nth, label IS NOT DISTINCT FROM first_value(label) OVER (PARTITION BY path"
            "  ORDER BY number) AS same FROM listed WHERE reason IS NULL) WHERE nth > 1) AS again"
            " WHERE listed.number = again.number",
            REPEATED,
            RELABELLED,
        )

    def add_results(self, table: pa.Table) -> None:
        """Adds the results of some files; columns as in `RESULTS`."""
        self.insert("INSERT INTO results SELECT * FROM new_rows", table)

    def update_shards(self, table: pa.Table) -> None:
        """Records the new shards of some images; columns as in `shards.REWRITTEN`."""
        changed = [name for name in table.column_names if name != "path"]
        self.insert(
            f"UPDATE results SET {', '.join(f'{name} = new_rows.{name}' for name in changed)} "
            "FROM new_rows WHERE results.path = new_rows.path AND results.reason IS NULL",
            table,
        )

    def execute(self, statement: str, *values: Any) -> None:
        """Runs a statement without a result; `values` replace its question marks."""
        self._connection.execute(statement, list(values))

    def insert(self, statement: str, new_rows: pa.Table) -> None:
        """Runs a statement that reads from a table named ``new_rows``."""
        self._connection.register("new_rows", new_rows)
        self._connection.execute(statement)
        self._connection.unregister("new_rows")

    def rows(self, query: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Yields the rows of a query, fetched in batches; other queries may run meanwhile."""
        cursor = self._connection.cursor()
        cursor.execute(query, list(values))
        while rows := cursor.fetchmany(_BATCH):
            yield from rows

    def row(self, query: str, *values: Any) -> tuple[Any, ...]:
        """Returns the only row of a query."""
        (row,) = self.rows(query, *values)
        return row

    def batches(self, query: str, length: int) -> Iterator[pa.RecordBatch]:
        """Yields the result of a query as Arrow batches of at most `length` rows."""
        with self._connection.cursor() as cursor:
            reader = cursor.sql(query).to_arrow_reader(length)
            assert reader is not None
            yield from reader

    def counts(self) -> dict[str, int]:
        """Returns by split how many listed files are to be decoded, in the order of `SPLITS`."""
        counts = dict(
            self.rows("SELECT split, count(*) FROM listed WHERE reason IS NULL GROUP BY split")
        )
        return {split: counts[split] for split in SPLITS if split in counts}

    def labels(self, split: str) -> list[str]:
        """Returns the labels of a split's listed files, in alphabetical order."""
        query = (
            "SELECT DISTINCT label FROM listed "
            "WHERE reason IS NULL AND label IS NOT NULL AND split = ? ORDER BY label"
        )
        return [label for (label,) in self.rows(query, split)]

    def listing(self) -> Iterator[tuple[str, int]]:
        """Yields path and size of every listed file, ordered by path."""
        yield from self.rows("SELECT path, size FROM listed ORDER BY path, number")

    def reasons(self) -> list[tuple[str, int]]:
        """Returns every reason with its number of files, the most frequent one first."""
        return list(
            self.rows(
                f"SELECT reason, count(*) AS n FROM ({REJECTED}) GROUP BY reason "
                "ORDER BY n DESC, reason"
            )
        )

    def summarize_reasons(self, most: int) -> list[str]:
        """Returns the most frequent reasons as text: ``3 x the file is empty``."""
        return [f"{count:,} x {reason}" for reason, count in self.reasons()[:most]]
