"""What ``dataset.json`` says about the rows: counts, pixel moments, duplicates, a hash.

The rows here are the small ones that the workers of `preparation` return, without pixels:
``path``, ``part``, ``split``, ``label``, ``pixel_sha256``, ``row_sha256``, ``pixel_sum`` and
``pixel_sum_squares``.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from fer_ray.labels import SPLITS
from fer_ray.sources import Rejected

Row = dict[str, Any]


def count_splits(labels: Sequence[str], kept: list[Row]) -> dict[str, Any]:
    """The value of ``splits``: of each split that has rows its count, parts and classes."""
    splits = {}
    for split in SPLITS:
        rows = [row for row in kept if row["split"] == split]
        counts = Counter(row["label"] for row in rows)
        if rows:
            splits[split] = {
                "rows": len(rows),
                "files": sorted({row["part"] for row in rows}),
                "classes": {label: counts[label] for label in labels},
                "unlabelled": counts[None],
            }
    return splits


def pixel_moments(kept: list[Row], image_size: int) -> tuple[float, float]:
    """Mean and population standard deviation of the train pixels, of 1.0, from exact sums."""
    train = [row for row in kept if row["split"] == "train"]
    count = len(train) * image_size**2
    total = sum(row["pixel_sum"] for row in train)
    squares = sum(row["pixel_sum_squares"] for row in train)
    return total / count / 255, math.sqrt(count * squares - total**2) / count / 255


def find_duplicates(kept: list[Row]) -> dict[str, Any]:
    """Counts the groups of images with the same picture.

    Returns:
        ``groups`` and ``images`` in them; groups that lie ``within`` one split, by split, and
        ``across`` splits; groups with ``conflicting_labels``; for each split but train, how
        many of its images have the same picture in train (``twins_in_train``).
    """
    by_picture: dict[str, list[Row]] = {}
    for row in kept:
        by_picture.setdefault(row["pixel_sha256"], []).append(row)
    groups = [rows for rows in by_picture.values() if len(rows) > 1]
    present = [split for split in SPLITS if any(row["split"] == split for row in kept)]
    within, twins = Counter[str](), Counter[str]()
    conflicting = 0
    for rows in groups:
        splits = {row["split"] for row in rows}
        if len(splits) == 1:
            within[rows[0]["split"]] += 1
        if "train" in splits:
            twins.update(row["split"] for row in rows)
        conflicting += len({row["label"] for row in rows} - {None}) > 1
    return {
        "groups": len(groups),
        "images": sum(map(len, groups)),
        "within": {split: within[split] for split in present},
        "across": len(groups) - within.total(),
        "conflicting_labels": conflicting,
        "twins_in_train": {split: twins[split] for split in present if split != "train"},
    }


def hash_rows(kept: list[Row]) -> str:
    """SHA-256 over the rows' hashes, ordered by split and id: independent of the parts."""
    ordered = sorted(kept, key=lambda row: (row["split"], row["path"]))
    return hashlib.sha256("".join(row["row_sha256"] for row in ordered).encode()).hexdigest()


def describe(info: dict[str, Any], rejected: list[Rejected]) -> Iterator[str]:
    """What was prepared, as a small table and two lines, for people."""
    unlabelled = any(split["unlabelled"] for split in info["splits"].values())
    columns = [*info["labels"], *(["unlabelled"] if unlabelled else []), "total"]
    yield "split".ljust(12) + "".join(name.rjust(max(9, len(name) + 2)) for name in columns)
    for name, split in info["splits"].items():
        counts = {**split["classes"], "unlabelled": split["unlabelled"], "total": split["rows"]}
        cells = (f"{counts[column]:,}".rjust(max(9, len(column) + 2)) for column in columns)
        yield name.ljust(12) + "".join(cells)
    yield f"pixel mean {info['pixel_mean']:.5f}, standard deviation {info['pixel_std']:.5f}"
    found = info["duplicates"]
    twins = ", ".join(f"{count:,} of {name}" for name, count in found["twins_in_train"].items())
    yield (
        f"same picture: {found['groups']:,} groups of {found['images']:,} images, "
        f"{found['across']:,} across splits, {found['conflicting_labels']:,} with conflicting "
        f"labels{'; also in train: ' + twins if twins else ''}"
    )
    yield f"quarantined: {len(rejected):,}"
    for reason, count in Counter(file.reason for file in rejected).most_common(10):
        yield f"  {count:,} x {reason}"
