"""Batch inference: runs a `Plan`, on Ray Data or in this process, and writes Parquet."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from fer_ray import storage
from fer_ray.data import predictions
from fer_ray.errors import UserError
from fer_ray.inference.plan import Plan
from fer_ray.inference.predictor import COUNTS, Predictor, default_batch_size
from fer_ray.runtime import resources
from fer_ray.runtime.data_tasks import map_here, map_on_actors
from fer_ray.runtime.process import check_gpu

_PROGRESS_S = 5.0
"""Seconds between lines of progress."""


def predict(
    plan: Plan,
    *,
    num_actors: int = 0,
    use_gpu: bool = False,
    batch_size: int = 0,
    local: bool = False,
    log: Callable[[str], None] = print,
) -> str:
    """Predicts every image once and writes all of the result or nothing.

    Args:
        plan: from `inference.plan`.
        num_actors: predicting processes; 0: one per GPU or CPU, more as an autoscaler adds nodes.
        use_gpu: whether each has a GPU.
        batch_size: number of images in a forward pass; 0: `default_batch_size`.
        local: whether to predict in this process, without Ray; the rows are the same.
        log: receives lines of progress.

    Returns:
        The folder of the predictions; it replaces older ones.

    Raises:
        UserError: where workers do not see the prepared input or the output, or it is damaged, or
            memory runs out. A loose image that a worker does not see becomes a row with an error.
        JobFailed: where a worker cannot read or write.
    """
    start = time.perf_counter()
    count = _no_actors if local else _count_actors
    actors = count(plan, num_actors, use_gpu, log)
    # as requested: Ray does not hide the GPUs from actors that requested none
    device = torch.device("cuda" if use_gpu else "cpu")
    batch_size = batch_size or default_batch_size(plan.checkpoint, device)
    _announce(plan, actors, log)
    # the unfinished folder lies beside the output: readers of all predictions search below it
    with storage.staged_directory(plan.folder, staging=_staging(plan.output)) as staging:
        predictor = _predictor(plan, staging, device=device, batch_size=batch_size)
        errors = _write_parts(plan, predictor, actors=actors, use_gpu=use_gpu, log=log)
        predictions.write_manifest(
            staging,
            rows=plan.rows,
            files=[task["part"] for task in plan.tasks],
            labels=plan.checkpoint.labels,
            checkpoint=plan.checkpoint.sha256,
            config=_manifest_config(plan, batch_size),
        )
    spent = f"in {time.perf_counter() - start:.1f} s"
    log(f"wrote {plan.rows:,} rows, {errors:,} of them with an error, {spent}")
    return plan.folder


def _announce(plan: Plan, actors: tuple[int, int], log: Callable[[str], None]) -> None:
    log(
        f"predicting {plan.rows:,} images of {plan.split} with {plan.run} "
        f"({plan.checkpoint.model.name}, epoch {plan.checkpoint.epoch}) {_where(*actors)}"
    )
    if skipped := plan.input.get("skipped"):
        log(f"skipping {len(skipped)} files that are not images; the manifest lists them")


def _manifest_config(plan: Plan, batch_size: int) -> dict[str, Any]:
    """What the manifest records about the checkpoint, the input and the computation."""
    return {
        "checkpoint": plan.checkpoint.path,
        "epoch": plan.checkpoint.epoch,
        "batch_size": batch_size,
        "flip_at_test": plan.checkpoint.flip_at_test,
        "training": plan.checkpoint.config,
        **plan.input,
    }


def _staging(output: str) -> str:
    """The folder for unfinished predictions: beside the output, unless that is another disk."""
    if not storage.is_uri(output) and Path(output).is_mount():
        return output  # the unfinished folder's name begins with a dot, which readers skip
    return storage.parent_of(output)


def _no_actors(
    plan: Plan, num_actors: int, use_gpu: bool, log: Callable[[str], None]
) -> tuple[int, int]:
    """Zeros, after a check that this process can predict alone."""
    if num_actors > 1:
        raise UserError(f"--num-actors: --local predicts in one process, not in {num_actors}")
    if use_gpu:
        check_gpu()
    return 0, 0


def _count_actors(
    plan: Plan, num_actors: int, use_gpu: bool, log: Callable[[str], None]
) -> tuple[int, int]:
    """The smallest and the largest number of actors, which differ where the cluster may grow."""
    name, flag = ("GPU", "--use-gpu") if use_gpu else ("CPU", "--num-actors")
    demand = resources.Demand(each={name: 1.0}, count=max(num_actors, 1), flags={name: flag})
    nodes = resources.check(demand, log=log)
    if num_actors:
        return num_actors, num_actors
    most = len(plan.tasks)  # further actors would have nothing to do
    fewest = max(min(resources.fitting(demand.each, nodes), most), 1)
    maximum = resources.fitting_at_maximum(demand.each)
    # where the maximum is not known, Ray Data adds actors while the cluster has room for them
    return fewest, max(most if maximum is None else min(maximum, most), fewest)


def _where(fewest: int, most: int) -> str:
    """Where the images are predicted, for a line of progress."""
    if not most:
        return "in this process"
    return f"on {fewest} actor(s)" if fewest == most else f"on {fewest} to {most} actors"


def _predictor(plan: Plan, staging: str, *, device: torch.device, batch_size: int) -> Predictor:
    return Predictor(
        path=plan.checkpoint.path,
        row={
            "run": plan.run,
            "split": plan.split,
            "predicted_at": datetime.datetime.now(datetime.UTC),
        },
        source=plan.source,
        data=plan.data,
        staging=staging,
        device=device,
        batch_size=batch_size,
    )


def _write_parts(
    plan: Plan,
    predictor: Predictor,
    *,
    actors: tuple[int, int],
    use_gpu: bool,
    log: Callable[[str], None],
) -> int:
    """Writes every part, on actors or (0) in this process; returns how many rows have an error."""
    if actors[1]:
        results = _on_actors(plan.tasks, predictor, actors=actors, use_gpu=use_gpu)
    else:
        results = map_here(plan.tasks, predictor, COUNTS)
    rows = errors = 0
    logged_at = time.monotonic()
    for table in results:
        (counts,) = table.to_pylist()
        rows, errors = rows + counts["rows"], errors + counts["errors"]
        if time.monotonic() - logged_at >= _PROGRESS_S:
            logged_at = time.monotonic()
            log(f"{rows:,} of {plan.rows:,} images")
    return errors


def _on_actors(
    tasks: list[dict[str, Any]], predictor: Predictor, *, actors: tuple[int, int], use_gpu: bool
) -> Iterator[pa.Table]:
    import ray

    return map_on_actors(
        tasks,
        predictor,
        COUNTS,
        compute=ray.data.ActorPoolStrategy(min_size=actors[0], max_size=actors[1]),
        num_cpus=0 if use_gpu else 1,
        num_gpus=1 if use_gpu else None,
    )
