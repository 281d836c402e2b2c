"""From any source to a prepared dataset, the pictures decoded in parallel by Ray Data.

The driver lists the files into a ledger on its disk and cuts them into parts; each Ray task
decodes and writes one part and returns one small row a file, from which the driver counts, finds
duplicates, decides what is held out or dropped, and writes ``dataset.json``. No picture passes
through the driver, its memory does not grow with their number, and what is written depends
neither on the number of workers nor on the order in which they finish.
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
from fer_ray.data.sources import NOT_THERE, ReadError
from fer_ray.errors import JobFailed, UserError
from fer_ray.preparation import shards, splitting
from fer_ray.preparation import statistics as dataset_summary
from fer_ray.preparation.inventory import KEPT, RESULTS, Ledger
from fer_ray.preparation.plan import Plan, plan
from fer_ray.runtime import resources
from fer_ray.runtime.data_tasks import map_tasks, quiet_ray_data

__all__ = ["Plan", "map_tasks", "plan", "prepare", "quiet_ray_data"]

_PROGRESS_S = 2.0
_DEMAND = resources.Demand(each={"CPU": 1.0}, flags={"CPU": "RAY_ADDRESS"})
"""The least that Ray Data's tasks go on with."""
_LOOKED_FOR = 200
"""How many of the files that workers did not find are looked for."""


def prepare(
    plan: Plan,
    *,
    log: Callable[[str], None] = print,
    finish: Callable[[str, Ledger, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Writes the prepared dataset, whole or not at all; Ray has to be started.

    Args:
        plan: what to do; it is used up.
        log: receives lines of progress.
        finish: called with the dataset's place, the ledger and the value of ``dataset.json``
            when all is written.

    Returns:
        The value of ``dataset.json``.

    Raises:
        UserError: when no train image can be used, or workers read or write another disk.
        JobFailed: when a worker cannot write.
    """
    start = time.monotonic()
    ledger = plan.ledger
    try:
        resources.check(_DEMAND, log=log)
        with storage.staged_directory(plan.output) as staging:
            _write_parts(plan, staging, log)
            _check_seen(plan)
            _check_train(ledger)
            _settle(plan, staging, log)
            _check_train(ledger)
            _verify_parts(ledger, staging, plan.output)
            dataset_summary.write_quarantine(ledger, staging)
            info = _summarize(plan)
            dataset_summary.write_duplicates(ledger, staging)
            storage.write_json(storage.join(staging, dataset.INFO_NAME), info)
        for line in (*dataset_summary.describe(info, ledger), *_warnings(plan, info)):
            log(line)
        rows = sum(split["rows"] for split in info["splits"].values())
        log(f"{rows:,} images in {time.monotonic() - start:.1f} s")
        if finish:
            finish(plan.output, ledger, info)
    finally:
        ledger.close()
    return info


def _check_train(ledger: Ledger) -> None:
    if not ledger.one(f"SELECT count(*) FROM {KEPT} AND split = 'train'")[0]:
        raise UserError(f"--source: no train image can be used: {ledger.reasons()[0][0]}")


def _write_parts(plan: Plan, staging: str, log: Callable[[str], None]) -> None:
    """Lets Ray Data write every part, and notes one result a file in the ledger."""
    counts = plan.ledger.counts()
    for split in counts:
        storage.make_directory(storage.join(staging, split))
    write = functools.partial(
        shards.write_part, pictures=plan.pictures, staging=staging, size=plan.image_size
    )
    done, total = 0, sum(counts.values())
    said = start = time.monotonic()
    for table in map_tasks(shards.write_tasks(plan.ledger, plan.image_size), write, RESULTS):
        plan.ledger.add_results(table)
        done += table.num_rows
        if time.monotonic() - said >= _PROGRESS_S or done == total:
            said = time.monotonic()
            log(f"{done:,} of {total:,} images, {said - start:.0f} s")
    if done != total:
        raise JobFailed(f"{done:,} results for {total:,} files")


def _check_seen(plan: Plan) -> None:
    """Refuses a source of which this process sees files that a worker did not."""
    absent = plan.ledger.rows(
        'SELECT path, "at" FROM listed JOIN results USING (path) WHERE listed.reason IS NULL '
        "AND results.reason = ? ORDER BY md5(path) LIMIT ?",
        NOT_THERE,
        _LOOKED_FOR,
    )
    for path, at in absent:
        try:
            plan.pictures.grey(path, at)
        except ReadError as error:
            if str(error) == NOT_THERE:  # for nobody: it is in the quarantine
                continue
        except decoding.DecodeError:
            pass
        raise UserError(
            f"--source: {path!r} is not seen by every worker: with several machines the files "
            "have to be on a shared disk or at a URI"
        )


def _settle(plan: Plan, staging: str, log: Callable[[str], None]) -> None:
    """Holds out and drops what is to be, now that every picture is known."""
    if plan.held_out:
        splitting.hold_out(plan.ledger, fraction=plan.held_out, seed=plan.seed)
    if plan.deduplicate:
        splitting.drop_twins(plan.ledger)
    tasks = list(shards.move_tasks(plan.ledger))
    if not tasks:
        return
    log(f"rewriting {len(tasks):,} parts without the rows that are moved or dropped")
    if plan.held_out:
        storage.make_directory(storage.join(staging, "validation"))
    move = functools.partial(shards.move_rows, staging=staging)
    for table in map_tasks(tasks, move, shards.MOVED):
        plan.ledger.move(table)
    for task in tasks:
        storage.remove(storage.join(staging, task["part"]))


def _verify_parts(ledger: Ledger, staging: str, output: str) -> None:
    """Checks that every part is there and holds as many rows as its worker said."""
    fs, root = storage.filesystem(staging)
    for part, count in ledger.rows(f"SELECT part, count(*) FROM {KEPT} GROUP BY part"):
        try:
            found = pq.read_metadata(storage.join(root, part), filesystem=fs).num_rows
        except FileNotFoundError as error:
            raise parquet.unseen(output) from error
        assert found == count, f"{part} has {found} rows, {count} were written"
    strange = ledger.one(f"SELECT count(*) FROM {KEPT} AND split <> split_part(part, '/', 1)")
    assert not strange[0], f"{strange[0]} rows lie in another split's part"


def _summarize(plan: Plan) -> dict[str, Any]:
    """The value of ``dataset.json``."""
    ledger = plan.ledger
    mean, std = dataset_summary.pixel_moments(ledger, plan.image_size)
    packages = ("ray", "pyarrow", "pillow", "numpy", "opencv-python-headless")
    held_out = {"fraction": plan.held_out, "seed": plan.seed} if plan.held_out else None
    return {
        "format": dataset.FORMAT,
        "labels": list(plan.labels),
        "image_size": plan.image_size,
        "source": plan.pictures.describe(ledger.listing()),
        "held_out_for_validation": held_out,
        "deduplicated": plan.deduplicate,
        "splits": dataset_summary.count_splits(plan.labels, ledger),
        "pixel_mean": mean,
        "pixel_std": std,
        "quarantined": sum(count for _, count in ledger.reasons()),
        "duplicates": dataset_summary.find_duplicates(ledger),
        "data_sha256": dataset_summary.hash_rows(ledger),
        "versions": {
            "fer_ray": __version__,
            **{name: importlib.metadata.version(name) for name in packages},
        },
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _warnings(plan: Plan, info: dict[str, Any]) -> Iterator[str]:
    """What the user should know before training on it."""
    mixed = plan.ledger.one(
        f"SELECT count(*) FROM {KEPT} AND split = 'validation' "
        "AND contains(lower(path), 'privatetest')"
    )[0]
    if mixed:
        yield (
            f"warning: {mixed:,} of validation are named PrivateTest: FER-2013's official test "
            "part is mixed in, so that figures on it are of no official split"
        )
    if "validation" not in info["splits"]:
        help_ = "no class has enough different pictures to hold one out of train"
        if not plan.held_out:
            help_ = "--validation-fraction 0.1 holds one out of train"
        yield f"warning: there is no validation split, which jobs/train.py needs: {help_}"
    for label in info["labels"]:
        if not info["splits"]["train"]["classes"][label]:
            yield f"warning: no image of train is left of the class {label}"
