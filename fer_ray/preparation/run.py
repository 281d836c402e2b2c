"""From any source to a prepared dataset; tasks of Ray decode the images in parallel.

The driver lists the files into an inventory on its disk and divides them into shards. Each Ray
task decodes and writes one shard and returns one small row per file. From these rows the driver
counts, finds duplicates, decides which images are held out or dropped, and writes
``dataset.json``. No image passes through the driver, its memory does not grow with their number,
and the output depends neither on the number of workers nor on the order in which they finish.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import time
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow.parquet as pq

from fer_ray import __version__, storage
from fer_ray.data import dataset, decoding, parquet
from fer_ray.data.sources.files import NOT_FOUND, NotFoundError, ReadError
from fer_ray.errors import JobFailed, UserError
from fer_ray.preparation import shards, splitting, statistics
from fer_ray.preparation.inventory import KEPT, RESULTS, Inventory
from fer_ray.preparation.plan import Plan
from fer_ray.runtime import resources
from fer_ray.runtime.data_tasks import map_tasks

_PROGRESS_S = 2.0
"""Seconds between two lines of progress."""
_DEMAND = resources.Demand(each={"CPU": 1.0}, flags={"CPU": "RAY_ADDRESS"})
"""The least that a task needs."""
_MAX_REREAD = 200
"""How many of the files that workers did not find are looked for in the driver."""
_PACKAGES = ("ray", "pyarrow", "pillow", "numpy", "opencv-python-headless")
"""Packages whose versions ``dataset.json`` records."""


def prepare(
    plan: Plan,
    *,
    log: Callable[[str], None] = print,
    finish: Callable[[str, Inventory, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Writes the prepared dataset, completely or not at all. Ray has to be running.

    Args:
        plan: what to do; it can be used only once.
        log: receives lines of progress.
        finish: called after the dataset is written, with its path, the inventory and the content
            of ``dataset.json``.

    Returns:
        The content of ``dataset.json``.

    Raises:
        UserError: when no train image can be used, or when workers cannot access the source or
            the output.
        JobFailed: when a worker cannot write.
    """
    start = time.monotonic()
    inventory = plan.inventory
    try:
        resources.check(_DEMAND, log=log)
        with storage.staged_directory(plan.output) as staging:
            _write_shards(plan, staging, log)
            _check_accessible(plan)
            _check_train(inventory)
            _split(plan, staging, log)
            _check_train(inventory)
            _verify_shards(inventory, staging, plan.output)
            statistics.write_quarantine(inventory, staging)
            summary = _summarize(plan)
            statistics.write_duplicates(inventory, staging)
            info = dataset.write_info(staging, summary)
        for line in (*statistics.describe(info, inventory), *_warnings(plan, info)):
            log(line)
        rows = sum(split["rows"] for split in info["splits"].values())
        log(f"{rows:,} images in {time.monotonic() - start:.1f} s")
        if finish:
            finish(plan.output, inventory, info)
    finally:
        inventory.close()
    return info


def _check_train(inventory: Inventory) -> None:
    if not inventory.row(f"SELECT count(*) FROM {KEPT} AND split = 'train'")[0]:
        raise UserError(f"--source: no train image can be used: {inventory.reasons()[0][0]}")


def _write_shards(plan: Plan, staging: str, log: Callable[[str], None]) -> None:
    """Lets workers write all shards, and adds one result per file to the inventory."""
    counts = plan.inventory.counts()
    for split in counts:
        storage.make_directory(storage.join(staging, split))
    write = functools.partial(
        shards.write_shard, images=plan.images, staging=staging, size=plan.image_size
    )
    done, total = 0, sum(counts.values())
    logged_at = start = time.monotonic()
    for table in map_tasks(shards.write_tasks(plan.inventory, plan.image_size), write, RESULTS):
        plan.inventory.add_results(table)
        done += table.num_rows
        if time.monotonic() - logged_at >= _PROGRESS_S or done == total:
            logged_at = time.monotonic()
            log(f"{done:,} of {total:,} images, {logged_at - start:.0f} s")
    if done != total:
        raise JobFailed(f"the workers returned {done:,} results for {total:,} files")


def _check_accessible(plan: Plan) -> None:
    """Refuses a source with files that exist on this machine, but not on that of a worker."""
    missing = plan.inventory.rows(
        'SELECT path, "at" FROM listed JOIN results USING (path) WHERE listed.reason IS NULL '
        "AND results.reason = ? ORDER BY md5(path) LIMIT ?",
        NOT_FOUND,
        _MAX_REREAD,
    )
    for path, at in missing:
        try:
            plan.images.grey(path, at)
        except NotFoundError:  # it exists nowhere, so it stays in the quarantine
            continue
        except (ReadError, decoding.DecodeError):
            pass
        raise UserError(
            f"--source: not every worker can access {path!r}: on several machines, the files have "
            "to be on a shared disk or at a URI"
        )


def _split(plan: Plan, staging: str, log: Callable[[str], None]) -> None:
    """Holds out and drops images, and rewrites the shards that held them."""
    if plan.held_out:
        splitting.hold_out(plan.inventory, fraction=plan.held_out, seed=plan.seed)
    if plan.deduplicate:
        splitting.drop_duplicates(plan.inventory)
    tasks = list(shards.rewrite_tasks(plan.inventory))
    if not tasks:
        return
    log(f"rewriting {len(tasks):,} shards without the images that are moved or dropped")
    if plan.held_out:
        storage.make_directory(storage.join(staging, "validation"))
    rewrite = functools.partial(shards.rewrite_shard, staging=staging)
    for table in map_tasks(tasks, rewrite, shards.REWRITTEN):
        plan.inventory.update_shards(table)
    for task in tasks:
        storage.remove(storage.join(staging, task["shard"]))


def _verify_shards(inventory: Inventory, staging: str, output: str) -> None:
    """Checks that every shard exists, as large and with as many rows as its worker has reported."""
    fs, root = storage.filesystem(staging)
    query = f"SELECT shard, count(*), any_value(shard_bytes) FROM {KEPT} GROUP BY shard"
    for shard, count, size in inventory.rows(query):
        try:
            written = storage.file_size(storage.join(staging, shard))
            num_rows = pq.read_metadata(storage.join(root, shard), filesystem=fs).num_rows
        except FileNotFoundError as error:
            raise parquet.output_not_shared_error(output) from error
        assert num_rows == count, f"{shard} has {num_rows} rows, {count} were written"
        assert written == size, f"{shard} has {written} bytes, {size} were written"
    query = f"SELECT count(*) FROM {KEPT} AND split <> split_part(shard, '/', 1)"
    (misplaced,) = inventory.row(query)
    assert not misplaced, f"{misplaced} rows are in another split's shard"


def _summarize(plan: Plan) -> dict[str, Any]:
    """Returns what ``dataset.json`` describes."""
    inventory = plan.inventory
    mean, std = statistics.pixel_moments(inventory, plan.image_size)
    held_out = {"fraction": plan.held_out, "seed": plan.seed} if plan.held_out else None
    return {
        "labels": list(plan.labels),
        "image_size": plan.image_size,
        "source": {"kind": plan.source_type, **plan.images.describe(inventory.listing())},
        "held_out_for_validation": held_out,
        "deduplicated": plan.deduplicate,
        "splits": statistics.count_splits(plan.labels, inventory),
        "pixel_mean": mean,
        "pixel_std": std,
        "quarantined": sum(count for _, count in inventory.reasons()),
        "duplicates": statistics.find_duplicates(inventory),
        "data_sha256": statistics.hash_rows(inventory),
        "versions": {
            "fer_ray": __version__,
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _warnings(plan: Plan, info: dict[str, Any]) -> Iterator[str]:
    """Yields what the user should know before training on the dataset."""
    (official_test,) = plan.inventory.row(
        f"SELECT count(*) FROM {KEPT} AND split = 'validation' "
        "AND contains(lower(path), 'privatetest')"
    )
    if official_test:
        yield (
            "warning: validation contains images of FER-2013's official test split "
            f"({official_test:,} named PrivateTest), so results are not comparable with published "
            "ones"
        )
    if "validation" not in info["splits"]:
        advice = "no class has enough different images to hold one out of train"
        if not plan.held_out:
            advice = "--validation-fraction 0.1 holds one out of train"
        yield f"warning: there is no validation split, which jobs/train.py needs: {advice}"
    for label in info["labels"]:
        if not info["splits"]["train"]["classes"][label]:
            yield f"warning: train has no image of the class {label} left"
