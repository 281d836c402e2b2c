"""Where each picture belongs, decided when all are known: held out for validation, or dropped."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import pyarrow as pa

from fer_ray.preparation.inventory import Ledger

DEFAULT_VALIDATION_FRACTION = 0.1

_BATCH = 8192
_TRAIN = "results WHERE reason IS NULL AND split = 'train'"
_GROUPS = (
    "SELECT arg_min(label, path) AS label, pixel_sha256, count(*) AS n "
    f"FROM {_TRAIN} GROUP BY pixel_sha256"
)
"""Equal pictures of train: the class they count for, and how many they are."""


def hold_out(ledger: Ledger, *, fraction: float, seed: int) -> None:
    """Gives part of train to validation: of each class, equal pictures on one side.

    Equal pictures are one group, in the class of the first of them by path. The groups of a
    class are put in an order that only the seed and the pictures decide; each goes to
    validation if it still fits into `fraction` of the class's images, rounded. A class of two
    groups or more has at least one image on either side. Of a class without a group, since
    each of its pictures also stands under another, one picture stays in train.

    Args:
        ledger: with the results; their `split` is changed.
        fraction: between 0 and 1.
        seed: others give other splits.
    """
    ledger.execute("CREATE TEMP TABLE held_out (pixel_sha256 BLOB)")
    ledger.execute(
        f"CREATE TABLE kept_back AS WITH owned AS ({_GROUPS}) "
        "SELECT DISTINCT arg_min(pixel_sha256, sha256(? || hex(pixel_sha256))) AS pixel_sha256 "
        f"FROM {_TRAIN} AND label NOT IN (SELECT label FROM owned) GROUP BY label",
        f"{seed}:",
    )
    groups = ledger.rows(
        f"SELECT label, pixel_sha256, n, pixel_sha256 IN (SELECT pixel_sha256 FROM kept_back) "
        f"FROM ({_GROUPS}) ORDER BY label, sha256(? || hex(pixel_sha256))",
        f"{seed}:",
    )
    sizes = dict(ledger.rows(f"SELECT label, sum(n) FROM ({_GROUPS}) GROUP BY label"))
    chosen: list[bytes] = []
    for label, members in groupby(groups, key=lambda row: row[0]):
        for picture in _choose(members, int(sizes[label]), fraction):
            chosen.append(picture)
            if len(chosen) == _BATCH:
                _note(ledger, chosen)
    _note(ledger, chosen)
    ledger.execute(
        "UPDATE results SET split = 'validation' WHERE reason IS NULL AND split = 'train' "
        "AND pixel_sha256 IN (SELECT pixel_sha256 FROM held_out)"
    )


def _choose(
    groups: Iterator[tuple[Any, bytes, int, bool]], total: int, fraction: float
) -> Iterator[bytes]:
    """The pictures of a class that are held out: as many as fit, at least one, never all."""
    room = min(max(round(total * fraction), 1), total - 1)
    smallest: tuple[int, bytes] | None = None
    taken, num_groups = 0, 0
    for _, picture, count, kept_back in groups:
        num_groups += 1
        if kept_back:
            continue
        if smallest is None or count < smallest[0]:
            smallest = (count, picture)
        if taken + count <= room:
            taken += count
            yield picture
    # every group is larger than the room: the smallest, unless it is the only one
    if not taken and num_groups > 1 and smallest:
        yield smallest[1]


def _note(ledger: Ledger, chosen: list[bytes]) -> None:
    table = pa.table({"pixel_sha256": pa.array(chosen, pa.binary())})
    ledger.insert("INSERT INTO held_out SELECT * FROM given", table)
    chosen.clear()


def drop_twins(ledger: Ledger) -> None:
    """Drops from train every image whose picture also stands in another split.

    The other splits stay as they are, and so does what train itself holds twice.

    Args:
        ledger: with the results; their `reason` is set, naming the splits.
    """
    ledger.execute(
        "UPDATE results SET reason = 'the same picture is in ' || twins.splits || "
        "CASE WHEN labels = label OR labels IS NULL THEN '' ELSE ', labelled ' || labels END || "
        "' (--deduplicate)' FROM (SELECT pixel_sha256, "
        "string_agg(DISTINCT label, ' and ' ORDER BY label) AS labels, "
        "string_agg(DISTINCT split, ' and ' ORDER BY split) AS splits FROM results "
        "WHERE reason IS NULL AND split <> 'train' GROUP BY pixel_sha256) AS twins "
        "WHERE results.pixel_sha256 = twins.pixel_sha256 AND results.split = 'train' "
        "AND results.reason IS NULL"
    )
