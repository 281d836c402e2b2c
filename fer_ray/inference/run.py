"""Batch inference: runs a `Plan`, on Ray Data or in this process, and writes Parquet."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from fer_ray import storage
from fer_ray.data import dataset, decoding, parquet, predictions, sources
from fer_ray.data.dataset import DatasetInfo
from fer_ray.data.labels import probability_column
from fer_ray.errors import UserError
from fer_ray.inference.plan import Plan
from fer_ray.models import checkpoint
from fer_ray.models.checkpoint import Checkpoint
from fer_ray.models.forward import Forward
from fer_ray.runtime import resources
from fer_ray.runtime.data_tasks import map_here, map_on_actors
from fer_ray.runtime.process import check_gpu

BATCH_SIZE = 256
"""Images in a forward pass."""

_PROGRESS_S = 5.0
"""Seconds between lines of progress."""
_COUNTS = pa.schema([("rows", pa.int64()), ("errors", pa.int64())])
"""What an actor returns for each part: its rows, and how many of them have an error."""


def predict(
    plan: Plan,
    *,
    num_actors: int = 0,
    use_gpu: bool = False,
    local: bool = False,
    log: Callable[[str], None] = print,
) -> str:
    """Predicts every image once and writes all of the result or nothing.

    Args:
        plan: from `inference.plan`.
        num_actors: predicting processes; 0: one per GPU or CPU, more as an autoscaler adds nodes.
        use_gpu: whether each has a GPU.
        local: whether to predict in this process, without Ray; the rows are the same.
        log: receives lines of progress.

    Returns:
        The folder of the predictions; it replaces older ones.

    Raises:
        UserError: where workers do not see the prepared input or the output, or it is damaged. A
            loose image that a worker does not see becomes a row with an error.
        JobFailed: where a worker cannot read or write.
    """
    start = time.perf_counter()
    count = _no_actors if local else _count_actors
    actors = count(plan, num_actors, use_gpu, log)
    log(
        f"predicting {plan.rows:,} images of {plan.split} with {plan.run} "
        f"({plan.checkpoint.model.name}, epoch {plan.checkpoint.epoch}) {_where(*actors)}"
    )
    if skipped := plan.input.get("skipped"):
        log(f"skipping {len(skipped)} files that are not images; the manifest lists them")
    # the unfinished folder lies beside the output: readers of all predictions search below it
    with storage.staged_directory(plan.folder, staging=_staging(plan.output)) as staging:
        errors = _write_parts(plan, staging, actors=actors, use_gpu=use_gpu, log=log)
        predictions.write_manifest(
            staging,
            rows=plan.rows,
            files=[task["part"] for task in plan.tasks],
            labels=plan.checkpoint.labels,
            checkpoint=plan.checkpoint.sha256,
            config=_manifest_config(plan),
        )
    spent = f"in {time.perf_counter() - start:.1f} s"
    log(f"wrote {plan.rows:,} rows, {errors:,} of them with an error, {spent}")
    return plan.folder


def _manifest_config(plan: Plan) -> dict[str, Any]:
    """What the manifest records about the checkpoint, the input and the computation."""
    return {
        "checkpoint": plan.checkpoint.path,
        "epoch": plan.checkpoint.epoch,
        "batch_size": BATCH_SIZE,
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


def _write_parts(
    plan: Plan,
    staging: str,
    *,
    actors: tuple[int, int],
    use_gpu: bool,
    log: Callable[[str], None],
) -> int:
    """Writes every part, on actors or (0) in this process; returns how many rows have an error."""
    predictor = _Predictor(
        path=plan.checkpoint.path,
        row={
            "run": plan.run,
            "split": plan.split,
            "predicted_at": datetime.datetime.now(datetime.UTC),
        },
        source=plan.source,
        data=plan.data,
        staging=staging,
        # as requested: Ray does not hide the GPUs from actors that requested none
        device="cuda" if use_gpu else "cpu",
    )
    if actors[1]:
        results = _on_actors(plan.tasks, predictor, actors=actors, use_gpu=use_gpu)
    else:
        results = map_here(plan.tasks, predictor, _COUNTS)
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
    tasks: list[dict[str, Any]], predictor: _Predictor, *, actors: tuple[int, int], use_gpu: bool
) -> Iterator[pa.Table]:
    import ray

    return map_on_actors(
        tasks,
        predictor,
        _COUNTS,
        compute=ray.data.ActorPoolStrategy(min_size=actors[0], max_size=actors[1]),
        num_cpus=0 if use_gpu else 1,
        num_gpus=1 if use_gpu else None,
    )


class _Predictor:
    """Predicts and writes parts, in an actor; loads the network with the first part."""

    def __init__(
        self,
        *,
        path: str,
        row: dict[str, Any],
        source: sources.FileSource | None,
        data: DatasetInfo | None,
        staging: str,
        device: str,
    ) -> None:
        self._path, self._device = path, torch.device(device)
        self._row, self._source, self._data, self._staging = row, source, data, staging

    @cached_property
    def _checkpoint(self) -> Checkpoint:
        return checkpoint.read(self._path)

    @cached_property
    def _model(self) -> nn.Module:
        torch.set_num_threads(1)  # one actor per CPU: more threads would only compete
        return self._checkpoint.load_model(self._device)

    @cached_property
    def _forward(self) -> Forward:
        return self._checkpoint.forward(self._device)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Predicts the part that one of `Plan.tasks` describes, and writes it."""
        (task,) = batch.to_pylist()
        size = self._checkpoint.image_size
        if self._data is not None:
            rows, images = _read_prepared(self._data, self._row["split"], task["file"], size)
        else:
            assert self._source is not None
            rows, images = _read_loose(self._source, task, size)
        table = self._table(rows, self._probabilities(images))
        parquet.write_table(table, self._staging, task["part"])
        errors = sum(row["error"] is not None for row in rows)
        return pa.table([[len(rows)], [errors]], schema=_COUNTS)

    def _probabilities(self, images: np.ndarray) -> np.ndarray:
        """(N, classes) float32 of (N, S, S) uint8."""
        forward = self._forward
        batches = [np.zeros((0, len(self._checkpoint.labels)), dtype=np.float32)]
        for start in range(0, len(images), BATCH_SIZE):
            batch = torch.from_numpy(images[start : start + BATCH_SIZE]).to(self._device)
            batches.append(forward.probabilities(self._model, batch).cpu().numpy())
        probabilities = np.concatenate(batches)
        if not ((probabilities >= 0) & (probabilities <= predictions.MAX_PROBABILITY)).all():
            raise UserError(
                f"{self._path}: the network gives probabilities that are no numbers between 0 and "
                "1: this checkpoint cannot predict"
            )
        return probabilities

    def _table(self, rows: list[dict[str, Any]], probabilities: np.ndarray) -> pa.Table:
        """The part's rows as the contract has them; `probabilities` skip rows with an error."""
        labels = self._checkpoint.labels
        model, sha256 = self._checkpoint.model.name, self._checkpoint.sha256
        values = iter(probabilities)
        complete_rows = []
        for row in rows:
            complete = {**row, **self._row, "model": model, "checkpoint": sha256}
            if row["error"] is None:
                scores = next(values)
                best = int(scores.argmax())
                complete |= {probability_column(name): s for name, s in zip(labels, scores)}
                complete |= {"predicted": labels[best], "confidence": scores[best]}
                if row["label"] is not None:
                    complete["correct"] = row["label"] == labels[best]
            complete_rows.append(complete)
        return pa.Table.from_pylist(complete_rows, predictions.schema(labels))


def _read_prepared(
    info: DatasetInfo, split: str, file: str, size: int
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Rows and (N, size, size) uint8 images of a part of a prepared split, which is checked."""
    table = dataset.read_part(info, split, file)
    columns = table.select(["image_id", "pixel_sha256", "label"])
    rows = [{**row, "error": None} for row in columns.to_pylist()]
    images = dataset.stack(table["image"], info.image_size)
    if info.image_size != size and len(images):
        images = np.stack([decoding.fit(image, size) for image in images])
    return rows, images.reshape(-1, size, size)


def _read_loose(
    source: sources.FileSource, task: dict[str, Any], size: int
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Rows and (M, size, size) uint8 images; a row without an image has the reason as its error."""
    rows: list[dict[str, Any]] = []
    images = []
    for path, at, reason in zip(task["path"], task["at"], task["reason"]):
        row: dict[str, Any] = {"image_id": path, "label": None, "error": None}
        try:
            if reason:
                raise sources.ReadError(reason)
            grey = decoding.decode(source.read(path, at))
            row["pixel_sha256"] = decoding.pixel_sha256(grey)
            images.append(decoding.fit(grey, size))
        except (sources.ReadError, decoding.DecodeError) as error:
            row["error"] = str(error)
        rows.append(row)
    return rows, np.stack(images) if images else np.zeros((0, size, size), np.uint8)
