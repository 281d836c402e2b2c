"""What runs in the process of one trial: the same loop as training's, on images that all share."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fer_ray import storage
from fer_ray.config.schema import TrainConfig
from fer_ray.data.dataset import DatasetInfo
from fer_ray.data.run_folder import RunFolder
from fer_ray.errors import JobFailed
from fer_ray.runtime import environment, process
from fer_ray.sweeps import store
from fer_ray.training import loop, ray_trainer, worker
from fer_ray.training.feed import Images
from fer_ray.training.memory_feed import MemoryFeed
from fer_ray.training.process_group import ProcessGroup
from fer_ray.training.telemetry import Telemetry

ERROR = "error.txt"
"""Holds the traceback of a trial that failed for a reason that nobody foresaw."""


def run(config: dict[str, Any], *, settings: dict[str, Any]) -> None:
    """Trains a trial up to an epoch, or goes on with it; how it ends is written into its folder.

    What the trial itself is to blame for (not finite, out of memory, any exception) ends it as
    failed and is no failure to Ray Tune: a retry would end in the same way. Only a process that
    dies is tried again; of several workers also one that ends by an exception that nobody
    foresaw, since the others see no more of it than that it is gone.

    Args:
        config: ``number`` of the trial, and ``until``, the epoch after which it pauses.
        settings: ``sweep`` (folder), ``config`` (`TrainConfig.to_dict`, the base's), ``info``
            (`DatasetInfo`) and ``images``, references to pixels and labels of each split.
    """
    sweep, number, until = settings["sweep"], config["number"], config["until"]
    try:
        trial = store.read_trial(sweep, number)
        if trial.is_over:
            return
        train_config = trial.config(TrainConfig.from_dict(settings["config"]))
        several = train_config.scaling.num_workers > 1
        (_with_workers if several else _alone)(sweep, number, train_config, settings, until)
        _finish(sweep, number, train_config, until)
    except _WorkersLost:
        raise  # as with a process that dies, Ray Tune tries again
    except (loop.NotFinite, JobFailed) as error:
        store.end(sweep, number, store.FAILED, _first_line(error))
    except Exception as error:
        reason = process.out_of_memory(error)
        if not reason:
            _keep_traceback(sweep, number)
            reason = f"{type(error).__name__}: {_first_line(error)}"
        store.end(sweep, number, store.FAILED, reason)
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # others share the device


def _alone(
    sweep: str, number: int, config: TrainConfig, settings: dict[str, Any], until: int
) -> None:
    """One process, one device or a part of it."""
    import ray
    from ray import tune

    process.keep_freed_memory()
    torch.set_num_threads(process.num_threads(config.scaling))
    device = torch.device("cuda" if config.scaling.use_gpu else "cpu")
    group = ProcessGroup(device=device)
    info: DatasetInfo = settings["info"]
    images = [Images.known(*ray.get(settings["images"][name])) for name in worker.SPLITS]
    feed = MemoryFeed(config, info, *images, group=group)
    folder = store.folder_of(sweep, number)

    def report(history: list[dict[str, Any]], save: Callable[[Path], None]) -> None:
        store.save(folder, len(history), history, save)
        tune.report(_reported(history[-1]))

    name = _name(sweep, number)
    loop.train(
        config,
        info,
        feed,
        group=group,
        run=name,
        report=report,
        environment=environment.describe(device),
        resume=store.resume(folder),
        until=until,
        log=None,
        callback=Telemetry(run=name, rank=0, device=device),
    )


def _name(sweep: str, number: int) -> str:
    """What a trial's lines, metrics and checkpoints are called."""
    return f"{storage.name_of(sweep)}-{number:05d}"


def _reported(row: dict[str, Any]) -> dict[str, Any]:
    """What Ray Tune is told after an epoch."""
    return {"epoch": row["epoch"], **store.measured(row)}


def _with_workers(
    sweep: str, number: int, config: TrainConfig, settings: dict[str, Any], until: int
) -> None:
    """A data-parallel run within the trial: for what does not fit one device."""
    from ray.tune.integration.ray_train import TuneReportCallback

    folder = store.folder_of(sweep, number)
    given: dict[str, Any] = {"config": config.to_dict(), "run": _name(sweep, number)}
    given |= {"folder": folder, "until": until, "log": False, "note_group": True}
    free_workers(sweep, number)  # of this trial's process before, if it was killed
    files = RunFolder(folder)
    files.clear_failure()
    try:
        ray_trainer.run_trainer(
            worker.work,
            {**given, "images": settings["images"]},
            # who stops the trial removes its workers: they must not be replaced
            replace(config.scaling, max_failures=0),
            run=_name(sweep, number),
            failed="its workers failed",
            callbacks=[TuneReportCallback()],
        )
    except JobFailed as error:
        if not files.failure:
            raise _WorkersLost(str(error)) from error
    if reason := files.failure:
        raise JobFailed(reason)


class _WorkersLost(RuntimeError):
    """The workers of a trial ended other than by their own decision."""


def free_workers(sweep: str, number: int) -> None:
    """Gives back what the workers of a trial that was killed still hold, if anything.

    Nobody else does while the sweep runs (`launch`): the next trial would wait for ever.
    """
    from ray import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    if group_id := RunFolder(store.folder_of(sweep, number)).placement_group:
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group_id))))


def _finish(sweep: str, number: int, config: TrainConfig, until: int) -> None:
    """Writes down that a trial has finished, and why before its last epoch, unless it pauses."""
    history, schedule = store.read_trial(sweep, number).history, config.schedule
    reason = None
    if len(history) < schedule.epochs:
        if len(history) == until:
            return
        spent_s = sum(row["seconds"] for row in history)
        reason = f"no better for {schedule.patience} epochs"
        if schedule.time_limit_s and spent_s > schedule.time_limit_s:
            reason = f"--time-limit-s {schedule.time_limit_s:g}"
    store.end(sweep, number, store.FINISHED, reason)


def _first_line(error: BaseException) -> str:
    return (str(error) or repr(error)).splitlines()[0]


def _keep_traceback(sweep: str, number: int) -> None:
    path = storage.join(store.folder_of(sweep, number), ERROR)
    with contextlib.suppress(OSError):
        storage.write_bytes(path, traceback.format_exc().encode())
