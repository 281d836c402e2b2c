"""The training of one trial, in its own process: the loop of `training` on shared images."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch

from fer_ray.config.schema import TrainConfig
from fer_ray.data.dataset import DatasetInfo
from fer_ray.errors import JobFailed, first_line
from fer_ray.runtime import environment, process
from fer_ray.sweeps import store
from fer_ray.sweeps.losses import GpuFailed, WorkersLost
from fer_ray.sweeps.store import SweepFolder, TrialFolder
from fer_ray.training import loop, ray_trainer, worker
from fer_ray.training.compilation import CannotCompile
from fer_ray.training.feed import Images
from fer_ray.training.loop import StopReason
from fer_ray.training.memory_feed import MemoryFeed
from fer_ray.training.process_group import ProcessGroup
from fer_ray.training.telemetry import Telemetry


def run(config: dict[str, Any], *, settings: dict[str, Any]) -> None:
    """Trains a trial up to an epoch, or resumes it, and records in its folder how it ended.

    Errors of the trial itself (a loss that is not finite, too little memory, any exception) end it
    as failed, since a retry would end in the same way. Lost processes and workers, and GPUs that
    fail, are raised: `Losses` decides whether the trial is trained again. With several workers,
    unexpected exceptions are raised too: the peers only see a lost worker.

    Args:
        config: ``number`` of the trial, ``until``, the epoch after which it pauses, and
            ``avoid``, ids of nodes that its workers must not use.
        settings: ``sweep`` (folder), ``config`` (`TrainConfig.to_dict` of the base settings),
            ``info`` (`DatasetInfo`), ``images``, references to the pixels and labels of each
            split, and ``gpus_per_trial``.

    Raises:
        WorkersLost: where workers, or a GPU, were lost. The process ends with it, since no other
            trial could use a GPU in which a kernel has failed from the same process.
    """
    folder, until = SweepFolder(settings["sweep"]).trial(config["number"]), config["until"]
    try:
        trial = folder.read()
        if trial.is_over:
            return
        train_config = trial.config(TrainConfig.from_dict(settings["config"]))
        if train_config.scaling.num_workers > 1:
            _train_on_workers(folder, train_config, settings, until, config.get("avoid", ()))
        else:
            _train_here(folder, train_config, settings, until)
        _end_unless_paused(folder, train_config)
    except WorkersLost:
        raise
    except (loop.NotFinite, CannotCompile, JobFailed) as error:
        folder.end(store.FAILED, first_line(error))
    except Exception as error:
        if failure := process.gpu_failure_here(error):
            raise GpuFailed(*failure) from error
        reason = process.out_of_memory(error)
        if not reason:
            folder.keep_traceback(traceback.format_exc())
            reason = f"{type(error).__name__}: {first_line(error)}"
        folder.end(store.FAILED, reason)
    finally:
        if torch.cuda.is_available():
            with contextlib.suppress(RuntimeError):  # once a kernel has failed, every call does
                torch.cuda.empty_cache()  # other trials share the device


def _log(message: str) -> None:
    """Ray forwards it to the driver's terminal."""
    print(message, flush=True)


def _train_here(
    folder: TrialFolder, config: TrainConfig, settings: dict[str, Any], until: int
) -> None:
    """Trains in this process, on one device or a fraction of it."""
    import ray
    from ray import tune

    process.keep_freed_memory()
    torch.set_num_threads(process.num_threads(config.scaling))
    device = torch.device("cuda" if config.scaling.use_gpu else "cpu")
    if 0 < settings["gpus_per_trial"] < 1:
        process.limit_gpu_memory(settings["gpus_per_trial"])
    group = ProcessGroup(device=device)
    info: DatasetInfo = settings["info"]
    images = [Images.known(*ray.get(settings["images"][name])) for name in worker.SPLITS]
    feed = MemoryFeed(config, info, *images, group=group)

    if (resume := folder.resume(_log)) is not None:
        resume.check_config(config)

    def report(history: list[dict[str, Any]], snapshot: loop.Snapshot) -> None:
        folder.save(history, snapshot())
        row = history[-1]
        tune.report({"epoch": row["epoch"], **store.measured(row)})

    loop.train(
        config,
        info,
        feed,
        group=group,
        run=folder.run,
        report=report,
        environment=environment.describe(device),
        resume=resume,
        until=until,
        log=None,
        callback=Telemetry(run=folder.run, rank=0, device=device),
    )


def _train_on_workers(
    folder: TrialFolder,
    config: TrainConfig,
    settings: dict[str, Any],
    until: int,
    avoid: Collection[str],
) -> None:
    """Trains data-parallel, for a model or batch that does not fit one device.

    Raises:
        WorkersLost: where the workers failed and left no reason, or a GPU failed.
        JobFailed: where they failed for a reason of the trial itself.
    """
    from ray.tune.integration.ray_train import TuneReportCallback

    path = folder.path
    worker_settings: dict[str, Any] = {"config": config.to_dict(), "run": folder.run}
    worker_settings |= {"folder": path, "until": until, "log": False, "note_group": True}
    free_workers(folder)  # of an earlier process of this trial that was killed
    folder.resume(_log)  # the workers look for the checkpoint themselves
    folder.files.clear_failure()
    try:
        ray_trainer.run_trainer(
            worker.work,
            {**worker_settings, "images": settings["images"]},
            # Ray Tune stops a trial by removing its workers: they must not be replaced
            replace(config.scaling, max_failures=0),
            run=folder.run,
            failed="its workers failed",
            callbacks=[TuneReportCallback()],
            avoid=avoid,
        )
    except JobFailed as error:
        if not folder.files.failure:
            raise WorkersLost(str(error)) from error
    if reason := folder.files.failure:
        if node := folder.files.failed_node:
            raise GpuFailed(reason, node)
        raise JobFailed(reason)


def free_workers(folder: TrialFolder) -> None:
    """Releases the resources that the workers of a killed trial still hold, if any.

    Ray releases them only when the sweep's job ends, and the next trial would wait for them.
    """
    from ray import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    if group_id := folder.files.placement_group:
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group_id))))


def _end_unless_paused(folder: TrialFolder, config: TrainConfig) -> None:
    """Records that a trial has finished; one that only came to its rung is paused.

    Early stopping is decided first: it may end a trial exactly at a rung.
    """
    schedule = config.schedule
    stop = loop.stop_reason(schedule, folder.read().history)
    if stop is None:
        return
    reasons = {
        StopReason.PATIENCE: f"no better score for {schedule.patience} epochs (--patience)",
        StopReason.TIME_LIMIT: f"time limit reached (--time-limit-s {schedule.time_limit_s:g})",
    }
    folder.end(store.FINISHED, reasons.get(stop))
