"""Plans a prediction: checks its input and lists the images, without Ray.

The images are divided into parts by their names alone, and each part into batches of one fixed
size. Neither the number of actors nor their order therefore changes a bit of the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fer_ray import storage
from fer_ray.data import dataset, image_source, predictions, row_groups, sources
from fer_ray.data.dataset import DatasetInfo
from fer_ray.errors import UserError
from fer_ray.models import run_checkpoints
from fer_ray.models.checkpoint import Checkpoint

IMAGES_PER_PART = 4096
"""Largest number of loose images in a part; a prepared data set keeps its own parts."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A prediction whose input has been checked; made by `plan`."""

    checkpoint: Checkpoint
    """The checkpoint that predicts."""
    run: str
    """Name of the run in the rows and in the output's path."""
    split: str
    """Name of the split in the rows and in the output's path."""
    output: str
    """The folder of all predictions: absolute local path or URI."""
    source: sources.FileSource | None
    """Where loose images are; None for a prepared data set."""
    tasks: list[dict[str, Any]]
    """One for each part: its name (``part``), and either its Parquet file within `data` (``file``)
    or its images (``path``, ``at``, ``reason``)."""
    data: DatasetInfo | None
    """The prepared data set; None for loose images."""
    rows: int
    """Number of images."""
    input: dict[str, Any]
    """What the manifest records about the input, as JSON values."""

    @property
    def folder(self) -> str:
        """The folder of this prediction."""
        return storage.join(self.output, self.run, self.split)


def plan(
    *,
    checkpoint_path: str,
    data: str | None = None,
    images: str | None = None,
    split: str,
    output: str,
    run: str | None = None,
    allow_fallback: bool = False,
    log: Callable[[str], None] = print,
) -> Plan:
    """Checks the input and lists the images.

    Args:
        checkpoint_path: a checkpoint's folder, or a run's: its best checkpoint.
        data: path or URI of a prepared data set, of which `split` is predicted.
        images: path or URI of a folder or zip of face crops in any layout, instead of `data`.
        split: the split, or for loose images the name to give them.
        output: the folder of all predictions.
        run: the name to predict under; by default that of the run that trained.
        allow_fallback: as for `run_checkpoints.find`, as is `log`.

    Raises:
        UserError: where the checkpoint, the input or a name cannot be used.
    """
    if (data is None) == (images is None):
        raise UserError("--data or --images: exactly one of the two is needed")
    chosen = run_checkpoints.find(checkpoint_path, allow_fallback=allow_fallback, log=log)
    name = storage.check_name("--run", run or chosen.run)
    storage.check_name("--split", split)
    storage.check_bucket("--output", storage.absolute(output))
    info = source = None
    if data is not None:
        info = dataset.read_info(data)
        tasks, rows, described = _prepared_tasks(info, split, chosen.labels)
    else:
        assert images is not None
        source = image_source.open_files(images)
        tasks, rows, described = _loose_tasks(source, images)
    return Plan(
        checkpoint=chosen,
        run=name,
        split=split,
        output=storage.absolute(output),
        source=source,
        data=info,
        tasks=tasks,
        rows=rows,
        input=described,
    )


def _prepared_tasks(
    info: DatasetInfo, split: str, labels: tuple[str, ...]
) -> tuple[list[dict[str, Any]], int, dict[str, Any]]:
    """The tasks of a prepared split, its number of images, and what to record about it."""
    if unknown := set(info.labels) - set(labels):
        raise UserError(
            f"--data: {info.path} has labels that the checkpoint does not know: "
            f"{', '.join(sorted(unknown))} (it knows {', '.join(labels)})"
        )
    part = info.split(split)
    if not part.rows:
        raise UserError(f"--split: {split} of {info.path} has no images")
    # missing and cut files are refused here; the content is checked by the worker that reads it
    row_groups.row_group_slices(info, split)
    tasks = [
        {"part": predictions.part_name(number), "file": file}
        for number, file in enumerate(part.files)
    ]
    return tasks, part.rows, {"data": info.path, "data_sha256": info.data_sha256}


def _loose_tasks(
    source: sources.FileSource, path: str
) -> tuple[list[dict[str, Any]], int, dict[str, Any]]:
    """The tasks of loose images, the number of images, and what to record about them."""
    files, rejected = sources.list_files(source)
    if not files:
        raise UserError(f"--images: {path} contains no image files")
    tasks = []
    for number, start in enumerate(range(0, len(files), IMAGES_PER_PART)):
        entries = files[start : start + IMAGES_PER_PART]
        columns = {key: [getattr(e, key) for e in entries] for key in ("path", "at", "reason")}
        tasks.append({"part": predictions.part_name(number), **columns})
    skipped = [{"path": entry.path, "reason": entry.reason} for entry in rejected]
    return tasks, len(files), {"images": path, "skipped": skipped}
