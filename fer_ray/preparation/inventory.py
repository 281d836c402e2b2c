"""The account of a preparation: every file that was seen, and what became of it.

It is a DuckDB file in a temporary folder, so that the memory of the driver does not grow with
the number of images; it also answers what grouping and ordering need.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from fer_ray import storage
from fer_ray.data.labels import SPLITS
from fer_ray.data.sources import RELABELLED, REPEATED, Entry

_MEMORY = "48MiB"
"""What DuckDB may hold of it in memory; the rest is on the disk."""
_BATCH = 8192

LISTED = pa.schema(
    [
        ("number", pa.int64()),
        ("path", pa.string()),
        ("size", pa.int64()),
        ("at", pa.binary()),
        ("split", pa.string()),
        ("label", pa.string()),
        ("reason", pa.string()),
    ]
)
"""A file as the source lists it; without `reason` it is to become a row."""

RESULTS = pa.schema(
    [
        ("part", pa.string()),
        ("path", pa.string()),
        ("split", pa.string()),
        ("label", pa.string()),
        ("reason", pa.string()),  # null: the file became a row
        ("pixel_sha256", pa.binary()),
        ("row_sha256", pa.binary()),
        ("pixel_sum", pa.int64()),
        ("pixel_sum_squares", pa.int64()),
    ]
)
"""What a worker says of a file; `part` is where its row is, `split` where it belongs."""

KEPT = "results WHERE reason IS NULL"
"""The rows of the dataset, for queries."""


class Ledger:
    """Two tables: ``listed`` (`LISTED`), then ``results`` (`RESULTS`)."""

    def __init__(self) -> None:
        self._claim = contextlib.ExitStack()
        parent = Path(tempfile.gettempdir())
        folder = self._claim.enter_context(
            storage.claimed_directory(parent, f"fer_ray-ledger-{os.getuid()}-")
        )
        self._connection = duckdb.connect(
            str(folder / "ledger.duckdb"),
            config={
                "memory_limit": _MEMORY,
                "threads": 1,
                "preserve_insertion_order": False,
                "temp_directory": str(folder),
            },
        )
        for name, schema in (("listed", LISTED), ("results", RESULTS)):
            empty = schema.empty_table()
            self.insert(f"CREATE TABLE {name} AS SELECT * FROM given", empty)

    def close(self) -> None:
        """Closes and deletes it."""
        self._connection.close()
        self._claim.close()

    def list_files(self, entries: Iterable[Entry]) -> None:
        """Takes in what a source lists; of equal paths the first one counts."""
        numbers = itertools.count()
        remaining = iter(entries)
        while batch := list(itertools.islice(remaining, _BATCH)):
            columns = [[getattr(one, name) for one in batch] for name in LISTED.names[1:]]
            columns = [[next(numbers) for _ in batch], *columns]
            table = pa.table([pa.array(c, f.type) for c, f in zip(columns, LISTED)], schema=LISTED)
            self.insert("INSERT INTO listed SELECT * FROM given", table)
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
        """Takes in what workers say of some files; columns as in `RESULTS`."""
        self.insert("INSERT INTO results SELECT * FROM given", table)

    def move(self, table: pa.Table) -> None:
        """Notes where rows are now: `path`, `part` and `row_sha256`."""
        self.insert(
            "UPDATE results SET part = given.part, row_sha256 = given.row_sha256 "
            "FROM given WHERE results.path = given.path AND results.reason IS NULL",
            table,
        )

    def execute(self, query: str, *values: Any) -> None:
        """Runs a statement."""
        self._connection.execute(query, list(values))

    def rows(self, query: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        """The rows of a query, a few at a time; other queries may run meanwhile."""
        cursor = self._connection.cursor()
        cursor.execute(query, list(values))
        while rows := cursor.fetchmany(_BATCH):
            yield from rows

    def one(self, query: str, *values: Any) -> tuple[Any, ...]:
        """The only row of a query."""
        (row,) = self.rows(query, *values)
        return row

    def batches(self, query: str, length: int) -> Iterator[pa.RecordBatch]:
        """The result of a query in Arrow, so many rows at a time."""
        with self._connection.cursor() as cursor:
            reader = cursor.sql(query).to_arrow_reader(length)
            assert reader is not None
            yield from reader

    def counts(self) -> dict[str, int]:
        """How many listed files are to become rows, by split, in the order of `SPLITS`."""
        found = dict(
            self.rows("SELECT split, count(*) FROM listed WHERE reason IS NULL GROUP BY split")
        )
        return {split: found[split] for split in SPLITS if split in found}

    def labels(self, split: str) -> list[str]:
        """The labels of a split's listed files, alphabetical."""
        query = (
            "SELECT DISTINCT label FROM listed "
            "WHERE reason IS NULL AND label IS NOT NULL AND split = ? ORDER BY label"
        )
        return [label for (label,) in self.rows(query, split)]

    def listing(self) -> Iterator[tuple[str, int]]:
        """Path and size of every file that can be named, ordered by path."""
        yield from self.rows("SELECT path, size FROM listed ORDER BY path, number")

    def rejected(self) -> Iterator[tuple[str, str]]:
        """Path and reason of every file that is no row, ordered by path."""
        yield from self.rows(
            "SELECT path, reason FROM listed WHERE reason IS NOT NULL UNION ALL "
            "SELECT path, reason FROM results WHERE reason IS NOT NULL ORDER BY path, reason"
        )

    def reasons(self) -> list[tuple[str, int]]:
        """How many files are no rows, by reason, the most frequent first."""
        return list(
            self.rows(
                "SELECT reason, count(*) AS n FROM (SELECT reason FROM listed UNION ALL "
                "SELECT reason FROM results) WHERE reason IS NOT NULL GROUP BY reason "
                "ORDER BY n DESC, reason"
            )
        )

    def insert(self, statement: str, given: pa.Table) -> None:
        """Runs a statement that takes its rows from the table called ``given``."""
        self._connection.register("given", given)
        self._connection.execute(statement)
        self._connection.unregister("given")
