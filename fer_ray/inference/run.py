"""Batch inference on Ray Data: a checkpoint and images in, predictions in Parquet out.

The images are cut into parts by their names alone, and each part is cut into batches of one
fixed size, so that neither the number of actors nor their order changes a bit of the result.
"""

from __future__ import annotations

import datetime
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from fer_ray import storage
from fer_ray.data import dataset, decoding, image_source, parquet, predictions, row_groups, sources
from fer_ray.data.labels import probability_column
from fer_ray.errors import UserError, first_line
from fer_ray.models import checkpoint
from fer_ray.models.checkpoint import Checkpoint
from fer_ray.runtime import resources
from fer_ray.runtime.data_tasks import map_tasks

BATCH_SIZE = 256
"""Images of a forward pass."""

IMAGES_PER_PART = 4096
"""The most loose images of a part; a prepared data set keeps its own parts."""

_PROGRESS_S = 5.0
_DONE = pa.schema([("rows", pa.int64()), ("errors", pa.int64())])
"""What an actor says of each part: its rows, and how many of them have an error."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A prediction whose input has been checked. Made by `plan`."""

    checkpoint: Checkpoint
    """What predicts."""
    run: str
    """Name of the run in the rows and in the output's path."""
    split: str
    """Name of the split in the rows and in the output's path."""
    output: str
    """The folder of all predictions: absolute place."""
    source: sources.FileSource | None
    """Where loose images are; None for a prepared data set."""
    tasks: list[dict[str, Any]]
    """One a part: its name, and either its Parquet file or its images' paths."""
    rows: int
    """How many images there are."""
    described: dict[str, Any]
    """What the manifest says about the input."""

    @property
    def folder(self) -> str:
        """Where the predictions will lie."""
        return storage.join(self.output, self.run, self.split)


def plan(
    *,
    checkpoint_path: str,
    data: str | None = None,
    images: str | None = None,
    split: str,
    output: str,
    run: str | None = None,
) -> Plan:
    """Checks the input and lists the images; needs no Ray.

    Args:
        checkpoint_path: a checkpoint's folder, or a run's: its best.
        data: place of a prepared data set, of which `split` is predicted.
        images: place of a folder or zip of face crops in any layout, instead of `data`.
        split: the split, or for loose images the name to give them.
        output: the folder of all predictions.
        run: the name to predict under; by default that of the run that trained.

    Raises:
        UserError: for everything about them that is wrong.
    """
    if (data is None) == (images is None):
        raise UserError("--data or --images: exactly one of the two is needed")
    found = checkpoint.find(checkpoint_path)
    found.load_tensors(checkpoint.MODEL)  # damaged weights are found here and not by workers
    name = storage.check_name("--run", run or found.run)
    storage.check_name("--split", split)
    storage.check_bucket("--output", storage.absolute(output))
    source = None
    if data is not None:
        tasks, rows, described = _prepared_tasks(data, split, found.labels)
    else:
        assert images is not None
        source = image_source.open_files(images)
        tasks, rows, described = _loose_tasks(source, images)
    return Plan(
        checkpoint=found,
        run=name,
        split=split,
        output=storage.absolute(output),
        source=source,
        tasks=tasks,
        rows=rows,
        described=described,
    )


def _prepared_tasks(
    data: str, split: str, labels: tuple[str, ...]
) -> tuple[list[dict[str, Any]], int, dict[str, Any]]:
    info = dataset.read_info(data)
    if strange := set(info.labels) - set(labels):
        raise UserError(
            f"--data: {info.path} has labels that the checkpoint does not know: "
            f"{', '.join(sorted(strange))} (it knows {', '.join(labels)})"
        )
    part = info.split(split)
    if not part.rows:
        raise UserError(f"--split: {split} of {info.path} has no images")
    row_groups.row_group_slices(
        info, split
    )  # absent and damaged parts are found here and not by workers
    tasks = [
        {"part": f"part-{number:05d}.parquet", "file": storage.join(info.path, file)}
        for number, file in enumerate(part.files)
    ]
    return tasks, part.rows, {"data": info.path, "data_sha256": info.data_sha256}


def _loose_tasks(
    source: sources.FileSource, given: str
) -> tuple[list[dict[str, Any]], int, dict[str, Any]]:
    files, rejected = sources.list_files(source)
    if not files:
        raise UserError(f"--images: {given} holds no files to predict")
    tasks = []
    for number, start in enumerate(range(0, len(files), IMAGES_PER_PART)):
        chosen = files[start : start + IMAGES_PER_PART]
        task = {name: [getattr(one, name) for one in chosen] for name in ("path", "at", "reason")}
        tasks.append({"part": f"part-{number:05d}.parquet", **task})
    skipped = [{"path": one.path, "reason": one.reason} for one in rejected]
    return tasks, len(files), {"images": given, "skipped": skipped}


def predict(
    plan: Plan,
    *,
    num_actors: int = 0,
    use_gpu: bool = False,
    log: Callable[[str], None] = print,
) -> str:
    """Predicts every image once and writes the result, whole or not at all.

    Args:
        plan: from `plan`.
        num_actors: processes that predict; 0: one a GPU with `use_gpu`, else one a CPU.
        use_gpu: whether each has a GPU.
        log: receives lines of progress.

    Returns:
        The folder of the predictions. Predictions that were there before are replaced.

    Raises:
        UserError: when workers do not see the prepared input or the output, or it is damaged. A
            loose picture that a worker does not see is a row with an error.
        JobFailed: when a worker cannot read or write.
    """
    start = time.perf_counter()
    actors = _count_actors(plan, num_actors, use_gpu, log)
    log(
        f"predicting {plan.rows:,} images of {plan.split} with {plan.run} "
        f"({plan.checkpoint.model.name}, epoch {plan.checkpoint.epoch}) on {actors} actor(s)"
    )
    if skipped := plan.described.get("skipped"):
        log(f"{len(skipped)} files are no pictures and are listed in the manifest")
    # the unfinished folder lies beside the output, not below it: readers of all predictions
    # must not meet it
    with storage.staged_directory(plan.folder, staging=_staging(plan.output)) as staging:
        errors = _write_parts(plan, staging, actors=actors, use_gpu=use_gpu, log=log)
        predictions.write_manifest(
            staging,
            rows=plan.rows,
            files=[task["part"] for task in plan.tasks],
            labels=plan.checkpoint.labels,
            checkpoint=plan.checkpoint.sha256,
            config={
                "checkpoint": plan.checkpoint.path,
                "epoch": plan.checkpoint.epoch,
                "batch_size": BATCH_SIZE,
                "flip_at_test": plan.checkpoint.flip_at_test,
                "training": plan.checkpoint.config,
                **plan.described,
            },
        )
    seconds = time.perf_counter() - start
    log(f"{plan.rows:,} rows, {errors:,} with an error, {seconds:.1f} s")
    return plan.folder


def _staging(output: str) -> str:
    """Where unfinished predictions lie: beside the output, unless that is another disk."""
    if not storage.is_uri(output) and Path(output).is_mount():
        return output  # the folder's name begins with a dot, which readers pass over
    return storage.parent_of(output)


def _count_actors(plan: Plan, num_actors: int, use_gpu: bool, log: Callable[[str], None]) -> int:
    kind, flag = ("GPU", "--use-gpu") if use_gpu else ("CPU", "--num-actors")
    demand = resources.Demand(each={kind: 1.0}, count=max(num_actors, 1), flags={kind: flag})
    nodes = resources.check(demand, log=log)
    return num_actors or max(min(resources.fitting(demand.each, nodes), len(plan.tasks)), 1)


def _write_parts(
    plan: Plan, staging: str, *, actors: int, use_gpu: bool, log: Callable[[str], None]
) -> int:
    """Lets Ray Data write every part; returns how many rows have an error."""
    import ray

    moment = datetime.datetime.now(datetime.UTC)
    predictor = _Predictor(
        path=plan.checkpoint.path,
        row={"run": plan.run, "split": plan.split, "predicted_at": moment},
        source=plan.source,
        staging=staging,
        # by what was asked for: Ray hides no GPU from actors that did not ask for one
        device="cuda" if use_gpu else "cpu",
    )
    results = map_tasks(
        plan.tasks,
        predictor,
        _DONE,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=0 if use_gpu else 1,
        num_gpus=1 if use_gpu else None,
    )
    done = errors = 0
    said = time.monotonic()
    for table in results:
        (row,) = table.to_pylist()
        done, errors = done + row["rows"], errors + row["errors"]
        if time.monotonic() - said >= _PROGRESS_S:
            said = time.monotonic()
            log(f"{done:,} of {plan.rows:,} images")
    return errors


class _Predictor:
    """Predicts and writes parts, in an actor; the first of them loads the network."""

    def __init__(
        self,
        *,
        path: str,
        row: dict[str, Any],
        source: sources.FileSource | None,
        staging: str,
        device: str,
    ) -> None:
        self._place, self._device = path, torch.device(device)
        self._row, self._source, self._staging = row, source, staging

    @cached_property
    def _checkpoint(self) -> Checkpoint:
        return checkpoint.read(self._place)

    @cached_property
    def _model(self) -> nn.Module:
        torch.set_num_threads(1)  # one actor a CPU: more threads would only compete
        return self._checkpoint.load_model(self._device)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Predicts the part that one task of `Plan.tasks` names, and writes it."""
        (task,) = batch.to_pylist()
        if self._source is None:
            rows, images = _read_prepared(task["file"], self._checkpoint.image_size)
        else:
            rows, images = _read_loose(self._source, task, self._checkpoint.image_size)
        table = self._table(rows, self._probabilities(images))
        parquet.write_table(table, self._staging, task["part"])
        errors = sum(row["error"] is not None for row in rows)
        return pa.table([[len(rows)], [errors]], schema=_DONE)

    def _probabilities(self, images: np.ndarray) -> np.ndarray:
        """(N, classes) float32 of (N, S, S) uint8."""
        forward = self._checkpoint.forward
        found = [np.zeros((0, len(self._checkpoint.labels)), dtype=np.float32)]
        for start in range(0, len(images), BATCH_SIZE):
            batch = torch.from_numpy(images[start : start + BATCH_SIZE]).to(self._device)
            found.append(forward.probabilities(self._model, batch).cpu().numpy())
        return np.concatenate(found)

    def _table(self, rows: list[dict[str, Any]], probabilities: np.ndarray) -> pa.Table:
        """The part's rows as the contract has them; `probabilities` skip rows with an error."""
        labels = self._checkpoint.labels
        model, sha256 = self._checkpoint.model.name, self._checkpoint.sha256
        values = iter(probabilities)
        filled = []
        for row in rows:
            full = {**row, **self._row, "model": model, "checkpoint": sha256}
            if row["error"] is None:
                scores = next(values)
                best = int(scores.argmax())
                full |= {probability_column(name): s for name, s in zip(labels, scores)}
                full |= {"predicted": labels[best], "confidence": scores[best]}
                if row["label"] is not None:
                    full["correct"] = row["label"] == labels[best]
            filled.append(full)
        return pa.Table.from_pylist(filled, predictions.schema(labels))


def _read_prepared(file: str, size: int) -> tuple[list[dict[str, Any]], np.ndarray]:
    fs, path = storage.filesystem(file)
    try:
        with fs.open_input_file(path) as stream:
            table = pq.ParquetFile(stream).read()
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"--data: {file} cannot be read: {first_line(error)}") from error
    columns = table.select(["image_id", "pixel_sha256", "label"])
    rows = [{**row, "error": None} for row in columns.to_pylist()]
    fit = functools.partial(decoding.fit, size=size)
    shapes = zip(
        table["image"].to_pylist(), table["height"].to_pylist(), table["width"].to_pylist()
    )
    images = [fit(np.frombuffer(pixels, np.uint8).reshape(h, w)) for pixels, h, w in shapes]
    return rows, np.stack(images)


def _read_loose(
    source: sources.FileSource, task: dict[str, Any], size: int
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Decodes images; one that cannot be is a row with the reason and no image."""
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
