"""What runs in each of the processes that train together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fer_ray import storage
from fer_ray.config.schema import TrainConfig
from fer_ray.data.dataset import DatasetInfo, read_info
from fer_ray.data.run_folder import RunFolder
from fer_ray.errors import UserError, first_line
from fer_ray.metrics import training_metrics
from fer_ray.models import checkpoint, run_checkpoints
from fer_ray.models.checkpoint import Checkpoint, OtherSettings
from fer_ray.runtime import environment
from fer_ray.runtime.process import (
    gpu_failure_here,
    keep_freed_memory,
    num_threads,
    out_of_memory,
)
from fer_ray.training import loop
from fer_ray.training.checkpoint_writer import CheckpointWriter
from fer_ray.training.compilation import CannotCompile
from fer_ray.training.feed import Feed, Images
from fer_ray.training.memory_feed import MemoryFeed
from fer_ray.training.process_group import ProcessGroup
from fer_ray.training.stream_feed import StreamFeed
from fer_ray.training.telemetry import Telemetry

SPLITS = ("train", "validation")


def work(settings: dict[str, Any]) -> None:
    """Trains as one of the workers, in the process that Ray Train started for it.

    Args:
        settings: as for `train`; ``images`` are references to Ray's object store.
    """
    import ray
    import ray.train

    from fer_ray.training import backend

    if failure := backend.failed_gpu():
        if ray.train.get_context().get_world_rank() == 0:
            RunFolder(settings["folder"]).write_failure(*failure)
        return  # without an exception: Ray Train would try the same nodes again
    _train(settings)


def _train(settings: dict[str, Any]) -> None:
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    group = ProcessGroup(
        rank=context.get_world_rank(),
        size=context.get_world_size(),
        device=ray.train.torch.get_device(),
    )
    telemetry = Telemetry(run=settings["run"], rank=group.rank, device=group.device)
    train(settings, group, fetch=ray.get, notify=ray.train.report, callback=telemetry)


def train(
    settings: dict[str, Any],
    group: ProcessGroup,
    *,
    fetch: Callable[[Any], Any] = lambda images: images,
    notify: Callable[[dict[str, Any]], None] = lambda row: None,
    callback: loop.Callback | None = None,
) -> None:
    """Trains as one of the workers, with or without Ray.

    Args:
        settings: ``config`` (`TrainConfig.to_dict`), ``run``, ``folder`` of the run, and either
            ``images``, pixels and labels of each split, or ``slices`` of each split and
            ``spare_cpus``, to stream them. ``until``: the epoch after which to pause. ``log``:
            False for no lines of progress. ``note_group``: whether to record the workers'
            placement group in the run's folder.
        group: the workers that train together.
        fetch: returns pixels and labels of an element of ``images``.
        notify: receives the history's row of each epoch.
        callback: optional; is notified of every step and epoch.
    """
    keep_freed_memory()
    config = TrainConfig.from_dict(settings["config"])
    torch.set_num_threads(num_threads(config.scaling))
    log = _log if group.rank == 0 and settings.get("log", True) else None
    folder = RunFolder(settings["folder"])
    if group.rank == 0:
        _prepare_folder(folder, note_group=settings.get("note_group", False))
    resume = _latest_checkpoint(folder, group, log)  # all workers wait here for the first
    info, feed = _open_data(settings, config, group, folder, fetch)
    waits = "until" in settings  # whoever pauses a run finds its checkpoint once it is reported
    with _recording_failure(folder, group.rank), CheckpointWriter(folder, waits=waits) as writer:
        if resume:
            resume.check_config(config)
        loop.train(
            config,
            info,
            feed,
            group=group,
            run=settings["run"],
            report=_reporter(group.rank, writer, config.schedule.epochs, notify, log),
            environment=environment.describe(group.device),
            resume=resume,
            until=settings.get("until"),
            log=log,
            callback=callback,
        )


def _prepare_folder(folder: RunFolder, *, note_group: bool) -> None:
    """Removes the failure of an earlier attempt, and records the workers' placement group.

    The group keeps its CPUs until it is removed: whoever kills the run needs to find it.

    Raises:
        UserError: where this worker's host does not see the run's folder.
    """
    if not storage.is_directory(folder.path):
        raise UserError(
            f"--storage: the host of worker 0 does not see {folder.path}: use a folder that all "
            "hosts share, or a URI such as s3://bucket/runs"
        )
    folder.clear_failure()
    if note_group:
        from ray.util import get_current_placement_group

        if placement_group := get_current_placement_group():
            folder.write_placement_group(placement_group.id.hex())


def _latest_checkpoint(
    folder: RunFolder, group: ProcessGroup, log: Callable[[str], None] | None
) -> Checkpoint | None:
    """The run's latest undamaged checkpoint, on every worker the one that worker 0 finds."""
    latest = run_checkpoints.latest(folder.path, log=log) if group.rank == 0 else None
    if latest and log:
        log(f"resuming after epoch {latest.epoch}")
    if latest:  # a crash may have come between a checkpoint and its row
        folder.write_history(latest.history)
    path = group.broadcast(latest.path if latest else "")
    return checkpoint.read(path) if path else None


def _open_data(
    settings: dict[str, Any],
    config: TrainConfig,
    group: ProcessGroup,
    folder: RunFolder,
    fetch: Callable[[Any], Any],
) -> tuple[DatasetInfo, Feed]:
    """Reads the data set's description and builds the feed; records why it fails, if it does."""
    try:
        info = read_info(config.data)
        if "slices" in settings:
            pieces, spare_cpus = settings["slices"], settings["spare_cpus"]
            return info, StreamFeed(config, info, pieces, group=group, spare_cpus=spare_cpus)
        train, validation = (Images.known(*fetch(settings["images"][name])) for name in SPLITS)
        return info, MemoryFeed(config, info, train, validation, group=group)
    except Exception as error:
        reason = f"worker {group.rank} cannot load the images: {first_line(error)}"
        folder.write_failure(*_known_failure(error) or (reason,))
        raise


@contextlib.contextmanager
def _recording_failure(folder: RunFolder, rank: int) -> Iterator[None]:
    """Records why the training failed, where a worker knows it better than its peers."""
    try:
        yield
    except (loop.NotFinite, OtherSettings, CannotCompile) as error:
        # all workers raise it alike, and a retry would end in the same way: so there is none
        if rank == 0:
            folder.write_failure(str(error))
    except Exception as error:
        if failure := _known_failure(error):  # the peers only see a lost worker
            folder.write_failure(*failure)
        raise


def _known_failure(error: Exception) -> tuple[str, ...] | None:
    """The arguments of `RunFolder.write_failure` where memory ran out or a GPU failed."""
    reason = out_of_memory(error)
    return (reason,) if reason else gpu_failure_here(error)


def _reporter(
    rank: int,
    writer: CheckpointWriter,
    epochs: int,
    notify: Callable[[dict[str, Any]], None],
    log: Callable[[str], None] | None,
) -> loop.Report:
    """What a worker does after each epoch; worker 0 saves the checkpoint and the history."""

    def report(history: list[dict[str, Any]], snapshot: loop.Snapshot) -> None:
        if rank == 0:
            writer.write(history, snapshot())
        notify(history[-1])
        if log:
            log(_epoch_line(history[-1], epochs))

    return report


def _epoch_line(row: dict[str, Any], epochs: int) -> str:
    train, validation = (_values(row, split) for split in SPLITS)
    return (
        f"epoch {row['epoch']}/{epochs}: train {train}; validation {validation}; "
        f"{row['images_per_s']:,.0f} images/s, {row['seconds']:.1f} s"
    )


def _values(row: dict[str, Any], split: str) -> str:
    """Loss and metrics of a split, such as ``loss 1.0312, accuracy 61.20%, macro-F1 58.75%``."""
    values = [
        f"{metric.title} {metric.text(row[f'{split}_{name}'], decimals=2)}{metric.unit}"
        for name, metric in training_metrics().items()
    ]
    return ", ".join([f"loss {row[f'{split}_loss']:.4f}", *values])


def _log(message: str) -> None:
    print(message, flush=True)
