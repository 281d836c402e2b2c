"""Which images are held out and dropped: by class, with duplicates in the same split."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fer_ray.data.sources.files import RELABELLED, REPEATED, Entry
from fer_ray.preparation import splitting, statistics
from fer_ray.preparation.inventory import REJECTED, RESULTS, Inventory

Row = tuple[str, str, str | None]
"""Name of the pixels (duplicates have the same), split and label."""


def inventory_of(rows: list[Row]) -> Inventory:
    """Returns an inventory with these images as results."""
    inventory = Inventory()
    values = [
        {
            "shard": f"{split}/part-00000.parquet",
            "path": f"{index:05}",
            "split": split,
            "label": label,
            "pixel_sha256": hashlib.sha256(image.encode()).digest(),
            "row_sha256": b"",
            "pixel_sum": 0,
            "pixel_sum_squares": 0,
        }
        for index, (image, split, label) in enumerate(rows)
    ]
    inventory.add_results(pa.Table.from_pylist(values, RESULTS))
    return inventory


@pytest.fixture
def results():
    """Applies a change to an inventory of some rows; returns split and reason of each."""

    def run(rows: list[Row], change) -> list[tuple[str, str | None]]:
        inventory = inventory_of(rows)
        try:
            change(inventory)
            return list(inventory.rows("SELECT split, reason FROM results ORDER BY path"))
        finally:
            inventory.close()

    return run


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 30).map(str), st.just("train"), st.sampled_from("abc")),
        min_size=1,
        max_size=80,
    ),
    st.floats(0.01, 0.99),
    st.integers(0, 5),
)
def test_duplicates_stay_together_and_each_class_gives_its_fraction(rows, fraction, seed):
    inventory = inventory_of(rows)
    try:
        splitting.hold_out(inventory, fraction=fraction, seed=seed)
        splits = [split for (split,) in inventory.rows("SELECT split FROM results ORDER BY path")]
    finally:
        inventory.close()
    sides = defaultdict(set)
    strata: dict[str, str] = {}
    for (image, _, label), split in zip(rows, splits):
        sides[image].add(split)
        strata.setdefault(image, label)  # the first by path decides
    assert all(len(found) == 1 for found in sides.values())
    left_in_train = {label for (_, _, label), split in zip(rows, splits) if split == "train"}
    assert left_in_train == {label for _, _, label in rows}
    strangers = left_in_train - set(strata.values())  # each keeps one group of another class
    sizes = Counter(image for image, _, _ in rows)
    for stratum in set(strata.values()):
        members = [image for image in sizes if strata[image] == stratum]
        held = [image for image in members if sides[image] == {"validation"}]
        total = sum(sizes[image] for image in members)
        taken = sum(sizes[image] for image in held)
        room = min(max(round(total * fraction), 1), total - 1)
        if len(members) == 1:
            assert not held
        elif strangers:
            assert max(len(members) - len(strangers), 0) == 0 or 0 < len(held) < len(members)
            assert taken <= max(room, max(sizes[image] for image in members))
        else:
            assert 0 < len(held) < len(members)
            smallest = min(sizes[image] for image in members)
            assert taken <= max(room, smallest)
            left = [sizes[image] for image in members if image not in held]
            # what is left does not fit any more
            assert taken + min(left) > room


def test_the_seed_decides_and_the_order_of_the_files_does_not(results):
    rows = [(f"p{index}", "train", "ab"[index % 2]) for index in range(60)]

    def held(rows: list[Row], seed: int) -> set[str]:
        found = results(rows, lambda one: splitting.hold_out(one, fraction=0.2, seed=seed))
        return {row[0] for row, (split, _) in zip(rows, found) if split == "validation"}

    first = held(rows, 0)
    assert len(first) == 12
    assert Counter("ab"[int(image[1:]) % 2] for image in first) == {"a": 6, "b": 6}
    assert held(rows[::-1], 0) == first
    assert held(rows, 1) != first


def test_a_class_of_duplicates_of_another_class_keeps_one_image(results):
    rows = [(f"p{index}", "train", "a") for index in range(20)]
    rows += [(f"p{index}", "train", "b") for index in (3, 11)]
    for seed in range(20):
        found = results(rows, lambda one, s=seed: splitting.hold_out(one, fraction=0.5, seed=s))
        assert [split for split, _ in found[20:]].count("train") >= 1
        held = sum(split == "validation" for split, _ in found)
        assert held == 11
    rows = [("p0", "train", "a"), ("p1", "train", "a"), ("p1", "train", "b")]
    for seed in range(5):  # only p0 can be held out
        found = results(rows, lambda one, s=seed: splitting.hold_out(one, fraction=0.1, seed=s))
        assert [split for split, _ in found] == ["validation", "train", "train"]


def test_train_loses_duplicates_of_other_splits_and_nothing_else(results):
    rows = [
        ("a", "train", "happy"),
        ("a", "train", "sad"),
        ("a", "validation", "happy"),
        ("b", "train", "sad"),
        ("b", "train", "sad"),
        ("c", "validation", "sad"),
        ("c", "test", None),
        ("d", "train", "sad"),
        ("d", "test", "sad"),
        ("d", "validation", "sad"),
    ]
    found = results(rows, splitting.drop_duplicates)
    of_validation = "a duplicate is in validation (--deduplicate)"
    of_another = "a duplicate is in validation, labelled happy (--deduplicate)"
    of_both = "a duplicate is in test and validation (--deduplicate)"
    dropped = {0: of_validation, 1: of_another, 7: of_both}
    assert [reason for _, reason in found] == [dropped.get(index) for index in range(len(rows))]
    assert [split for split, _ in found] == [split for _, split, _ in rows]


def test_duplicates_against_a_case_worked_by_hand():
    inventory = inventory_of(
        [
            ("a", "train", "happy"),
            ("a", "train", "sad"),
            ("b", "validation", "sad"),
            ("b", "validation", "sad"),
            ("c", "train", "sad"),
            ("c", "test", None),
            ("c", "test", None),
            ("d", "train", "happy"),
        ]
    )
    assert statistics.find_duplicates(inventory) == {
        "groups": 3,
        "images": 7,
        "within": {"train": 1, "validation": 1, "test": 0},
        "across": 1,
        "conflicting_labels": 1,
        "twins_in_train": {"validation": 0, "test": 2},
    }
    inventory.close()


def test_of_equal_paths_the_first_counts():
    inventory = Inventory()
    entries = [
        Entry(path="1", split="train", label="a", reason="broken"),
        Entry(path="1", split="train", label="b"),
        Entry(path="1", split="train", label="b"),
        Entry(path="1", split="train", label="c"),
        Entry(path="0", split="test"),
    ]
    inventory.add_files(entries)
    assert inventory.counts() == {"train": 1, "test": 1}
    assert inventory.labels("train") == ["b"]
    assert list(inventory.rows(f"{REJECTED} ORDER BY path, reason")) == [
        ("1", REPEATED),
        ("1", RELABELLED),
        ("1", "broken"),
    ]
    assert [path for path, _ in inventory.listing()] == ["0", "1", "1", "1", "1"]
    inventory.close()
