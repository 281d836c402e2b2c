"""What runs in each of the processes that train together."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from fer_ray import storage
from fer_ray.config.schema import TrainConfig
from fer_ray.data.dataset import DatasetInfo, read_info
from fer_ray.data.history import write_history
from fer_ray.metrics import training_metrics
from fer_ray.models import checkpoint
from fer_ray.models.checkpoint import Checkpoint
from fer_ray.runtime import environment
from fer_ray.runtime.process import keep_freed_memory, num_threads, out_of_memory
from fer_ray.training import loop
from fer_ray.training.feed import Feed, Images
from fer_ray.training.memory_feed import MemoryFeed
from fer_ray.training.process_group import ProcessGroup
from fer_ray.training.stream_feed import StreamFeed
from fer_ray.training.telemetry import Telemetry

HISTORY = "history.parquet"
FAILURE = "failure.json"
"""Where a worker leaves why it failed: the first one where all did alike, which no retry would
change; the one that ran out of memory."""
PLACEMENT_GROUP = "placement_group.json"
SPLITS = ("train", "validation")


def work(settings: dict[str, Any]) -> None:
    """Trains as one of the workers, in the process that Ray Train made for it.

    Args:
        settings: ``config`` (`TrainConfig.to_dict`), ``run``, ``folder`` of the run, and either
            ``images``, a reference to pixels and labels of each split, or ``pieces`` of each
            split and ``spare_cpus``, to stream them. ``until``: the epoch after which to pause.
            ``say``: False for no lines of progress. ``note_group``: whether to leave the id of
            the workers' placement group in `PLACEMENT_GROUP`.
    """
    import ray.train
    import ray.train.torch

    logging.getLogger("ray.train").setLevel(logging.ERROR)
    keep_freed_memory()
    config = TrainConfig.from_dict(settings["config"])
    torch.set_num_threads(num_threads(config.scaling))
    context = ray.train.get_context()
    rank = context.get_world_rank()
    log = _log if rank == 0 and settings.get("log", True) else None
    if rank == 0 and settings.get("note_group"):
        _note_group(settings["folder"])
    group = ProcessGroup(
        rank=rank, size=context.get_world_size(), device=ray.train.torch.get_device()
    )
    info = read_info(config.data)
    feed = _feed(settings, config, info, group)
    if rank == 0:  # that of an attempt before; the others wait for the checkpoint's name
        storage.remove(storage.join(settings["folder"], FAILURE))
    resume = _last_checkpoint(settings["folder"], group)
    if resume and log:
        log(f"going on after epoch {resume.epoch}")
    if resume and rank == 0:  # a crash may have come between the checkpoint and its row
        write_history(storage.join(settings["folder"], HISTORY), resume.history)
    callback = Telemetry(
        run=settings["run"], rank=rank, folder=settings["folder"], device=group.device
    )
    with _noting_failure(settings["folder"], rank), callback:
        loop.train(
            config,
            info,
            feed,
            group=group,
            run=settings["run"],
            report=_reporter(rank, settings["folder"], config.schedule.epochs, log),
            provenance=environment.describe(group.device),
            resume=resume,
            until=settings.get("until"),
            log=log,
            callback=callback,
        )


@contextlib.contextmanager
def _noting_failure(folder: str, rank: int) -> Iterator[None]:
    """Leaves in `FAILURE` why the training failed, where that is known."""
    try:
        yield
    except loop.NotFinite as error:
        # raised by all workers alike: a retry would end the same way, so there is none
        if rank == 0:
            _note_failure(folder, str(error))
    except Exception as error:
        if reason := out_of_memory(error):  # of one worker: its end is what tells the others
            _note_failure(folder, reason)
        raise


def _note_failure(folder: str, reason: str) -> None:
    storage.write_json(storage.join(folder, FAILURE), {"reason": reason})


def _last_checkpoint(folder: str, group: ProcessGroup) -> Checkpoint | None:
    """The latest whole one of the run, on every worker the one that the first finds.

    Ray Train's own list lacks what its controller had not heard of when a host was lost, or is
    lost itself. And a worker of before may still be writing while this is asked.
    """
    found = checkpoint.latest(folder) if group.rank == 0 else None
    path = group.agree(found.path if found else "")
    return checkpoint.read(path) if path else None


def _note_group(folder: str) -> None:
    """For whoever ends the run from outside: the group keeps its CPUs until it is removed."""
    from ray.util import get_current_placement_group

    if group := get_current_placement_group():
        storage.write_json(storage.join(folder, PLACEMENT_GROUP), {"id": group.id.hex()})


def _feed(
    settings: dict[str, Any], config: TrainConfig, info: DatasetInfo, group: ProcessGroup
) -> Feed:
    import ray

    if "pieces" in settings:
        spare = settings["spare_cpus"]
        return StreamFeed(config, info, settings["pieces"], group=group, spare_cpus=spare)
    train, validation = (Images.known(*ray.get(settings["images"][name])) for name in SPLITS)
    return MemoryFeed(config, info, train, validation, group=group)


def _reporter(
    rank: int, folder: str, epochs: int, log: Callable[[str], None] | None
) -> Callable[..., None]:
    """What a worker does after each epoch: the first one hands its checkpoint to Ray Train."""
    import ray.train

    def report(history: list[dict[str, Any]], save: Callable[[Path], None]) -> None:
        row = history[-1]
        with tempfile.TemporaryDirectory() as temporary:
            kept = None
            if rank == 0:
                save(Path(temporary))
                kept = ray.train.Checkpoint.from_directory(temporary)
            ray.train.report(row, checkpoint=kept)
        if rank == 0:
            write_history(storage.join(folder, HISTORY), history)
        if log is None:
            return
        train, validation = (_measured(row, split) for split in SPLITS)
        log(
            f"epoch {row['epoch']}/{epochs}: train {train}; validation {validation}; "
            f"{row['images_per_s']:,.0f} images/s, {row['seconds']:.1f} s"
        )

    return report


def _measured(row: dict[str, Any], split: str) -> str:
    """Loss and metrics of a split, such as ``loss 1.0312, accuracy 61.20%, macro-F1 58.75%``."""
    values = [
        f"{metric.title} {metric.text(row[f'{split}_{name}'], decimals=2)}{metric.unit}"
        for name, metric in training_metrics().items()
    ]
    return ", ".join([f"loss {row[f'{split}_loss']:.4f}", *values])


def _log(message: str) -> None:
    print(message, flush=True)
