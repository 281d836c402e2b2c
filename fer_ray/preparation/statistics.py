"""What ``dataset.json`` says about the rows: counts, pixel moments, duplicates, a hash.

All of it is asked of the `Ledger` of a preparation, whose ``results`` hold one small row an
image, without pixels.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fer_ray import storage
from fer_ray.data import dataset
from fer_ray.data.labels import SPLITS
from fer_ray.preparation.inventory import KEPT, Ledger

MOST_REASONS = 10
MOST_CONFLICTS = 5
"""How many of each the table names; ``quarantine.parquet`` and ``duplicates.parquet`` have all."""

_ROWS = 8192


def count_splits(labels: Sequence[str], ledger: Ledger) -> dict[str, Any]:
    """The value of ``splits``: of each split that has rows its count, parts and classes."""
    splits = {}
    for split in SPLITS:
        query = f"SELECT label, count(*) FROM {KEPT} AND split = ? GROUP BY label"
        counts = Counter(dict(ledger.rows(query, split)))
        query = f"SELECT DISTINCT part FROM {KEPT} AND split = ? ORDER BY part"
        if counts:
            splits[split] = {
                "rows": counts.total(),
                "files": [part for (part,) in ledger.rows(query, split)],
                "classes": {label: counts[label] for label in labels},
                "unlabelled": counts[None],
            }
    return splits


def pixel_moments(ledger: Ledger, image_size: int) -> tuple[float, float]:
    """Mean and population standard deviation of the train pixels, of 1.0, from exact sums."""
    images, total, squares = ledger.one(
        "SELECT count(*), sum(pixel_sum)::HUGEINT, sum(pixel_sum_squares)::HUGEINT "
        f"FROM {KEPT} AND split = 'train'"
    )
    count = images * image_size**2
    return total / count / 255, math.sqrt(count * squares - total**2) / count / 255


def find_duplicates(ledger: Ledger) -> dict[str, Any]:
    """Counts the groups of images with the same picture.

    Returns:
        ``groups`` and ``images`` in them; groups that lie ``within`` one split, by split, and
        ``across`` splits; groups with ``conflicting_labels``; for each split but train, how
        many of its images have the same picture in train (``twins_in_train``).
    """
    ledger.execute(
        "CREATE OR REPLACE TABLE twins AS SELECT pixel_sha256, count(*) AS n, "
        "count(DISTINCT split) AS num_splits, any_value(split) AS any_split, "
        "bool_or(split = 'train') AS in_train, count(DISTINCT label) > 1 AS conflicting "
        f"FROM {KEPT} GROUP BY pixel_sha256 HAVING count(*) > 1"
    )
    groups, images, across, conflicting = ledger.one(
        "SELECT count(*), coalesce(sum(n), 0)::BIGINT, count(*) FILTER (num_splits > 1), "
        "count(*) FILTER (conflicting) FROM twins"
    )
    within = dict(
        ledger.rows("SELECT any_split, count(*) FROM twins WHERE num_splits = 1 GROUP BY ALL")
    )
    twins = dict(
        ledger.rows(
            "SELECT split, count(*) FROM results JOIN twins USING (pixel_sha256) "
            "WHERE reason IS NULL AND in_train GROUP BY split"
        )
    )
    present = {split for (split,) in ledger.rows(f"SELECT DISTINCT split FROM {KEPT}")}
    ordered = [split for split in SPLITS if split in present]
    return {
        "groups": groups,
        "images": images,
        "within": {split: within.get(split, 0) for split in ordered},
        "across": across,
        "conflicting_labels": conflicting,
        "twins_in_train": {split: twins.get(split, 0) for split in ordered if split != "train"},
    }


def hash_rows(ledger: Ledger) -> str:
    """SHA-256 over the rows' hashes, ordered by split and id: independent of the parts."""
    digest = hashlib.sha256()
    for (row,) in ledger.rows(f"SELECT row_sha256 FROM {KEPT} ORDER BY split, path"):
        digest.update(row.hex().encode())
    return digest.hexdigest()


def write_duplicates(ledger: Ledger, folder: str) -> None:
    """Writes ``duplicates.parquet``: every image whose picture stands there more than once.

    Call `find_duplicates` before.
    """
    query = (
        "SELECT lower(hex(pixel_sha256)) AS pixel_sha256, path AS image_id, split, label, "
        "conflicting AS conflicting_labels FROM results JOIN twins USING (pixel_sha256) "
        "WHERE reason IS NULL ORDER BY pixel_sha256, split, image_id"
    )
    fs, root = storage.filesystem(folder)
    path = storage.join(root, dataset.DUPLICATES_NAME)
    with pq.ParquetWriter(path, dataset.DUPLICATES_SCHEMA, filesystem=fs) as writer:
        for batch in ledger.batches(query, _ROWS):
            writer.write_table(pa.Table.from_batches([batch]).cast(dataset.DUPLICATES_SCHEMA))


def write_quarantine(ledger: Ledger, folder: str) -> None:
    """Writes ``quarantine.parquet``: every file that is no row, and why; there also when empty."""
    fs, root = storage.filesystem(folder)
    path = storage.join(root, dataset.QUARANTINE_NAME)
    with pq.ParquetWriter(path, dataset.QUARANTINE_SCHEMA, filesystem=fs) as writer:
        rows: list[tuple[str, str]] = []
        for row in ledger.rejected():
            rows.append(row)
            if len(rows) == _ROWS:
                writer.write_table(_quarantined(rows))
                rows.clear()
        writer.write_table(_quarantined(rows))


def _quarantined(rows: list[tuple[str, str]]) -> pa.Table:
    columns = [pa.array(list(column), pa.string()) for column in zip(*rows)] or [[], []]
    return pa.table(columns, schema=dataset.QUARANTINE_SCHEMA)


def _shown(label: str) -> str:
    """A label on one line of a table."""
    plain = "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in label)
    return plain if len(plain) <= 24 else f"{plain[:23]}…"


def describe(info: dict[str, Any], ledger: Ledger) -> Iterator[str]:
    """What was prepared, as a small table and a few lines, for people."""
    unlabelled = any(split["unlabelled"] for split in info["splits"].values())
    columns = [*map(_shown, info["labels"]), *(["unlabelled"] if unlabelled else []), "total"]
    yield "split".ljust(12) + "".join(name.rjust(max(9, len(name) + 2)) for name in columns)
    for name, split in info["splits"].items():
        counts = [split["classes"][label] for label in info["labels"]]
        counts += [*([split["unlabelled"]] if unlabelled else []), split["rows"]]
        cells = (f"{n:,}".rjust(max(9, len(name) + 2)) for n, name in zip(counts, columns))
        yield name.ljust(12) + "".join(cells)
    yield f"pixel mean {info['pixel_mean']:.5f}, standard deviation {info['pixel_std']:.5f}"
    yield from _describe_duplicates(info["duplicates"], ledger)
    yield f"quarantined: {info['quarantined']:,}"
    reasons = ledger.reasons()
    for reason, count in reasons[:MOST_REASONS]:
        yield f"  {count:,} x {reason}"
    if left := reasons[MOST_REASONS:]:
        yield f"  {sum(count for _, count in left):,} x other reasons"


def _describe_duplicates(found: dict[str, Any], ledger: Ledger) -> Iterator[str]:
    twins = ", ".join(f"{count:,} of {name}" for name, count in found["twins_in_train"].items())
    groups = "group" if found["groups"] == 1 else "groups"
    yield (
        f"same picture: {found['groups']:,} {groups} of {found['images']:,} images, "
        f"{found['across']:,} across splits, {found['conflicting_labels']:,} with conflicting "
        f"labels{'; also in train: ' + twins if twins else ''}"
    )
    conflicts = ledger.rows(
        "SELECT string_agg(coalesce(label, 'no label') || ' ' || path, ', ' ORDER BY path) "
        "FROM results JOIN twins USING (pixel_sha256) WHERE reason IS NULL AND conflicting "
        f"GROUP BY pixel_sha256 ORDER BY min(path) LIMIT {MOST_CONFLICTS}"
    )
    for (names,) in conflicts:
        yield f"  conflict: {names[:160]}{'…' if len(names) > 160 else ''}"
    if found["conflicting_labels"] > MOST_CONFLICTS:
        more = found["conflicting_labels"] - MOST_CONFLICTS
        yield f"  and {more:,} more: {dataset.DUPLICATES_NAME}"
