"""What ``dataset.json`` records about the images: counts, pixel moments, duplicates, a hash.

Everything is computed from the inventory of a preparation, whose results hold one small row per
image, without pixels.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fer_ray import storage
from fer_ray.data import dataset
from fer_ray.data.labels import SPLITS
from fer_ray.preparation.inventory import KEPT, REJECTED, Inventory

MAX_REASONS = 10
"""How many reasons are printed; ``quarantine.parquet`` has all."""
MAX_CONFLICTS = 5
"""How many groups with conflicting labels are printed; ``duplicates.parquet`` has all."""

_ROWS = 8192


def count_splits(labels: Sequence[str], inventory: Inventory) -> dict[str, Any]:
    """Returns the value of ``splits``: rows, shards and class counts of each split with images."""
    splits = {}
    for split in SPLITS:
        query = f"SELECT label, count(*) FROM {KEPT} AND split = ? GROUP BY label"
        counts = Counter(dict(inventory.rows(query, split)))
        query = (
            "SELECT shard, count(*), any_value(shard_bytes), any_value(shard_sha256) "
            f"FROM {KEPT} AND split = ? GROUP BY shard ORDER BY shard"
        )
        if counts:
            parts = {
                shard: dataset.Part(rows=rows, num_bytes=size, sha256=sha256).to_dict()
                for shard, rows, size, sha256 in inventory.rows(query, split)
            }
            splits[split] = {
                "rows": counts.total(),
                "files": list(parts),
                "parts": parts,
                "classes": {label: counts[label] for label in labels},
                "unlabelled": counts[None],
            }
    return splits


def pixel_moments(inventory: Inventory, image_size: int) -> tuple[float, float]:
    """Returns mean and population standard deviation of the train pixels, scaled to 0..1.

    Both are computed from exact integer sums.
    """
    images, total, squares = inventory.row(
        "SELECT count(*), sum(pixel_sum)::HUGEINT, sum(pixel_sum_squares)::HUGEINT "
        f"FROM {KEPT} AND split = 'train'"
    )
    count = images * image_size**2
    return total / count / 255, math.sqrt(count * squares - total**2) / count / 255


def find_duplicates(inventory: Inventory) -> dict[str, Any]:
    """Finds the groups of images with equal pixels, and creates the table ``duplicates``.

    Returns:
        The number of ``groups`` and of ``images`` in them; the number of groups that lie
        ``within`` one split, by split, and ``across`` splits; the number of groups with
        ``conflicting_labels``; and for each split but train, how many of its images are
        duplicates of train images (``twins_in_train``).
    """
    # min and max: DuckDB takes six times as long for count(DISTINCT ...)
    num_splits = " + ".join(f"bool_or(split = '{split}')::INT" for split in SPLITS)
    inventory.execute(
        "CREATE OR REPLACE TABLE duplicates AS SELECT pixel_sha256, count(*) AS n, "
        f"{num_splits} AS num_splits, any_value(split) AS any_split, "
        "bool_or(split = 'train') AS in_train, "
        "coalesce(min(label) <> max(label), false) AS conflicting "
        f"FROM {KEPT} GROUP BY pixel_sha256 HAVING count(*) > 1"
    )
    groups, images, across, conflicting = inventory.row(
        "SELECT count(*), coalesce(sum(n), 0)::BIGINT, count(*) FILTER (num_splits > 1), "
        "count(*) FILTER (conflicting) FROM duplicates"
    )
    within = dict(
        inventory.rows(
            "SELECT any_split, count(*) FROM duplicates WHERE num_splits = 1 GROUP BY ALL"
        )
    )
    in_train = dict(
        inventory.rows(
            "SELECT split, count(*) FROM results JOIN duplicates USING (pixel_sha256) "
            "WHERE reason IS NULL AND in_train GROUP BY split"
        )
    )
    present = {split for (split,) in inventory.rows(f"SELECT DISTINCT split FROM {KEPT}")}
    ordered = [split for split in SPLITS if split in present]
    return {
        "groups": groups,
        "images": images,
        "within": {split: within.get(split, 0) for split in ordered},
        "across": across,
        "conflicting_labels": conflicting,
        "twins_in_train": {split: in_train.get(split, 0) for split in ordered if split != "train"},
    }


def hash_rows(inventory: Inventory) -> str:
    """Returns the SHA-256 of the rows' hashes, ordered by split and id; shards play no role."""
    digest = hashlib.sha256()
    query = f"SELECT lower(hex(row_sha256)) AS digits FROM {KEPT} ORDER BY split, path"
    for batch in inventory.batches(query, _ROWS):
        digest.update("".join(batch["digits"].to_pylist()).encode())
    return digest.hexdigest()


def write_duplicates(inventory: Inventory, folder: str) -> None:
    """Writes ``duplicates.parquet``: all images that `find_duplicates`, called before, has found.

    Args:
        inventory: of the preparation.
        folder: path or URI to write into.
    """
    query = (
        "SELECT lower(hex(pixel_sha256)) AS pixel_sha256, path AS image_id, split, label, "
        "conflicting AS conflicting_labels FROM results JOIN duplicates USING (pixel_sha256) "
        "WHERE reason IS NULL ORDER BY pixel_sha256, split, image_id"
    )
    batches = (pa.Table.from_batches([batch]) for batch in inventory.batches(query, _ROWS))
    _write(folder, dataset.DUPLICATES_NAME, dataset.DUPLICATES_SCHEMA, batches)


def write_quarantine(inventory: Inventory, folder: str) -> None:
    """Writes ``quarantine.parquet``: every file that is not in the dataset, and the reason.

    Args:
        inventory: of the preparation.
        folder: path or URI to write into; the file is written even if it has no rows.
    """
    query = f"{REJECTED} ORDER BY path, reason"
    batches = (pa.Table.from_batches([batch]) for batch in inventory.batches(query, _ROWS))
    _write(folder, dataset.QUARANTINE_NAME, dataset.QUARANTINE_SCHEMA, batches)


def _write(folder: str, name: str, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    fs, root = storage.filesystem(folder)
    with pq.ParquetWriter(storage.join(root, name), schema, filesystem=fs) as writer:
        for table in tables:
            writer.write_table(table.cast(schema))


def describe(info: dict[str, Any], inventory: Inventory) -> Iterator[str]:
    """Yields the lines that summarize a prepared dataset for the user.

    Args:
        info: the content of ``dataset.json``.
        inventory: of its preparation.
    """
    has_unlabelled = any(split["unlabelled"] for split in info["splits"].values())
    labels = [_printable(label) for label in info["labels"]]
    columns = [*labels, *(["unlabelled"] if has_unlabelled else []), "total"]
    yield "split".ljust(12) + "".join(name.rjust(max(9, len(name) + 2)) for name in columns)
    for name, split in info["splits"].items():
        counts = [split["classes"][label] for label in info["labels"]]
        counts += [*([split["unlabelled"]] if has_unlabelled else []), split["rows"]]
        cells = (f"{n:,}".rjust(max(9, len(name) + 2)) for n, name in zip(counts, columns))
        yield name.ljust(12) + "".join(cells)
    yield f"pixel mean {info['pixel_mean']:.5f}, standard deviation {info['pixel_std']:.5f}"
    yield from _describe_duplicates(info["duplicates"], inventory)
    yield f"quarantined: {info['quarantined']:,}"
    reasons = inventory.reasons()
    for reason, count in reasons[:MAX_REASONS]:
        yield f"  {count:,} x {reason}"
    if others := reasons[MAX_REASONS:]:
        yield f"  {sum(count for _, count in others):,} x other reasons"


def _describe_duplicates(duplicates: dict[str, Any], inventory: Inventory) -> Iterator[str]:
    in_train = ", ".join(f"{n:,} of {name}" for name, n in duplicates["twins_in_train"].items())
    groups = "group" if duplicates["groups"] == 1 else "groups"
    yield (
        f"duplicates: {duplicates['groups']:,} {groups} of {duplicates['images']:,} images, "
        f"{duplicates['across']:,} across splits, {duplicates['conflicting_labels']:,} with "
        f"conflicting labels{'; also in train: ' + in_train if in_train else ''}"
    )
    conflicts = inventory.rows(
        "SELECT string_agg(coalesce(label, 'no label') || ' ' || path, ', ' ORDER BY path) "
        "FROM results JOIN duplicates USING (pixel_sha256) WHERE reason IS NULL AND conflicting "
        f"GROUP BY pixel_sha256 ORDER BY min(path) LIMIT {MAX_CONFLICTS}"
    )
    for (names,) in conflicts:
        yield f"  conflict: {names[:160]}{'…' if len(names) > 160 else ''}"
    if duplicates["conflicting_labels"] > MAX_CONFLICTS:
        more = duplicates["conflicting_labels"] - MAX_CONFLICTS
        yield f"  and {more:,} more: see {dataset.DUPLICATES_NAME}"


def _printable(label: str) -> str:
    """Returns a label in at most 24 printable characters."""
    plain = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in label)
    return plain if len(plain) <= 24 else f"{plain[:23]}…"
