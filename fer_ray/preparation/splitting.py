"""The split of each image, decided when all images are known: held out, or dropped."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import pyarrow as pa

from fer_ray.preparation.inventory import Inventory

DEFAULT_VALIDATION_FRACTION = 0.1
"""Fraction that is held out of a source without splits."""

_BATCH = 8192
_TRAIN = "results WHERE reason IS NULL AND split = 'train'"
_GROUPS = (
    "SELECT arg_min(label, path) AS label, pixel_sha256, count(*) AS n "
    f"FROM {_TRAIN} GROUP BY pixel_sha256"
)
"""The groups of duplicates within train: the class that each counts for, and its size."""


def hold_out(inventory: Inventory, *, fraction: float, seed: int) -> None:
    """Moves a fraction of each class from train to validation.

    Duplicates form one group, which stays together and counts for the class of its first image
    by path. The groups of a class are sorted by a hash of the seed and the pixels. Each group in
    turn is moved if it still fits into `fraction` of the class's images, rounded. A class with
    two or more groups keeps at least one image in each of the two splits. If all images of a
    class are duplicates that count for other classes, one of its groups stays in train.

    Args:
        inventory: with the results; their `split` is changed.
        fraction: between 0 and 1.
        seed: another seed moves other images.
    """
    inventory.execute("CREATE TEMP TABLE held_out (pixel_sha256 BLOB)")
    inventory.execute(
        f"CREATE TABLE kept_back AS WITH owned AS ({_GROUPS}) "
        "SELECT DISTINCT arg_min(pixel_sha256, sha256(? || hex(pixel_sha256))) AS pixel_sha256 "
        f"FROM {_TRAIN} AND label NOT IN (SELECT label FROM owned) GROUP BY label",
        f"{seed}:",
    )
    groups = inventory.rows(
        f"SELECT label, pixel_sha256, n, pixel_sha256 IN (SELECT pixel_sha256 FROM kept_back) "
        f"FROM ({_GROUPS}) ORDER BY label, sha256(? || hex(pixel_sha256))",
        f"{seed}:",
    )
    sizes = dict(inventory.rows(f"SELECT label, sum(n) FROM ({_GROUPS}) GROUP BY label"))
    chosen: list[bytes] = []
    for label, of_class in groupby(groups, key=lambda row: row[0]):
        for pixel_sha256 in _choose(of_class, int(sizes[label]), fraction):
            chosen.append(pixel_sha256)
            if len(chosen) == _BATCH:
                _record(inventory, chosen)
    _record(inventory, chosen)
    inventory.execute(
        "UPDATE results SET split = 'validation' WHERE reason IS NULL AND split = 'train' "
        "AND pixel_sha256 IN (SELECT pixel_sha256 FROM held_out)"
    )


def _choose(
    groups: Iterator[tuple[Any, bytes, int, bool]], total: int, fraction: float
) -> Iterator[bytes]:
    """Yields the groups of a class to hold out: as many as fit, at least one, never all."""
    room = min(max(round(total * fraction), 1), total - 1)
    smallest: tuple[int, bytes] | None = None
    taken, num_groups = 0, 0
    for _, pixel_sha256, count, is_kept_back in groups:
        num_groups += 1
        if is_kept_back:
            continue
        if smallest is None or count < smallest[0]:
            smallest = (count, pixel_sha256)
        if taken + count <= room:
            taken += count
            yield pixel_sha256
    # no group fits: take the smallest, unless it is the only one
    if not taken and num_groups > 1 and smallest:
        yield smallest[1]


def _record(inventory: Inventory, chosen: list[bytes]) -> None:
    table = pa.table({"pixel_sha256": pa.array(chosen, pa.binary())})
    inventory.insert("INSERT INTO held_out SELECT * FROM new_rows", table)
    chosen.clear()


def drop_duplicates(inventory: Inventory) -> None:
    """Drops every image from train that also occurs in another split.

    The other splits do not change, and duplicates within train stay.

    Args:
        inventory: with the results; the `reason` of dropped images is set and names the splits.
    """
    inventory.execute(
        "UPDATE results SET reason = 'a duplicate is in ' || elsewhere.splits || "
        "CASE WHEN labels = label OR labels IS NULL THEN '' ELSE ', labelled ' || labels END || "
        "' (--deduplicate)' FROM (SELECT pixel_sha256, "
        "string_agg(DISTINCT label, ' and ' ORDER BY label) AS labels, "
        "string_agg(DISTINCT split, ' and ' ORDER BY split) AS splits FROM results "
        "WHERE reason IS NULL AND split <> 'train' GROUP BY pixel_sha256) AS elsewhere "
        "WHERE results.pixel_sha256 = elsewhere.pixel_sha256 AND results.split = 'train' "
        "AND results.reason IS NULL"
    )
