"""A data-parallel training run on Ray: `plan` it without Ray, then `fit` it.

A run is a folder, ``<storage>/<run>/``: `Ray Train` keeps its checkpoints there (the best and
the last), beside ``config.json``, ``history.parquet`` and, when it has ended, ``run.json``.
The same name with the same settings goes on from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fer_ray import models, provenance, storage
from fer_ray.config import TrainConfig, differences
from fer_ray.dataset import DatasetInfo, load_split, read_info
from fer_ray.errors import JobFailed, UserError
from fer_ray.history import write_history

CONFIG = "config.json"
HISTORY = "history.parquet"
RESULT = "run.json"
_FAILURE = "failure.json"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A training run whose input has been checked."""

    config: TrainConfig
    """All settings; the data's place is absolute."""
    info: DatasetInfo
    """The prepared data set."""
    storage: str
    """The folder of all runs: absolute local path or URI."""
    run: str
    """The run's name."""
    resumes: bool
    """Whether the run's folder is there already, with the same settings."""

    @property
    def folder(self) -> str:
        """The run's folder."""
        return storage.join(self.storage, self.run)

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing left to do."""
        return storage.exists(storage.join(self.folder, RESULT))


def plan(config: TrainConfig, *, storage_place: str, run: str) -> Plan:
    """Checks a run's input, without Ray.

    Raises:
        UserError: where the data set is missing or does not fit the settings, or a run of that
            name exists with other settings.
    """
    storage.check_name("--run", run)
    config = _with_absolute_places(config)
    info = read_info(config.data)
    for split in ("train", "validation"):
        labelled = info.split(split).rows - info.split(split).unlabelled
        if not labelled:
            raise UserError(f"--data: {info.place} has no labelled images in its {split} split")
    batch = config.schedule.global_batch_size
    rows = info.split("train").rows - info.split("train").unlabelled
    if batch > rows:
        raise UserError(
            f"--global-batch-size: {batch} is more than the {rows} images of the train split"
        )
    models.check(config.model, num_classes=len(info.labels), image_size=info.image_size)
    place = storage.absolute(storage_place)
    resumes = _check_same(config, info, storage.join(place, run))
    return Plan(config=config, info=info, storage=place, run=run, resumes=resumes)


def _with_absolute_places(config: TrainConfig) -> TrainConfig:
    """Workers run in another directory."""
    model, weights = config.model, config.model.weights
    if weights and weights != "imagenet":
        model = dataclasses.replace(model, weights=storage.absolute(weights))
    return dataclasses.replace(config, data=storage.absolute(config.data), model=model)


def _check_same(config: TrainConfig, info: DatasetInfo, folder: str) -> bool:
    """Whether there is such a run already; refuses one with other settings or data."""
    if not storage.exists(storage.join(folder, CONFIG)):
        return False
    saved = storage.read_json(storage.join(folder, CONFIG))
    found = differences(saved["config"], config.to_dict())
    if saved["data_sha256"] != info.data_sha256:
        found.append(f"data: {saved['config']['data']} -> {config.data} (other images)")
    if found:
        raise UserError(
            f"--run: {folder} exists with other settings ({'; '.join(found)}): give another "
            "name, or the same settings to resume it"
        )
    return True


def fit(plan: Plan, *, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Trains on the Ray cluster that is connected, or resumes, or finds the run finished.

    Args:
        plan: from `plan`.
        say: takes lines of progress.

    Returns:
        The content of ``run.json``; its ``train_s`` are the seconds of all epochs, its ``wall_s``
        those of the last sitting, start-up included.

    Raises:
        JobFailed: where the loss is no longer finite, or workers were lost too often.
    """
    if plan.is_finished:
        say(f"run {plan.run} is finished already")
        return storage.read_json(storage.join(plan.folder, RESULT))
    _check_resources(plan.config, say)
    storage.write_json(
        storage.join(plan.folder, CONFIG),
        {"config": plan.config.to_dict(), "data_sha256": plan.info.data_sha256},
    )
    storage.remove(storage.join(plan.folder, _FAILURE))
    _remove_damaged_snapshot(plan.folder)
    start = time.perf_counter()
    say(_announcement(plan))
    _run_workers(plan)
    failure = storage.join(plan.folder, _FAILURE)
    if storage.exists(failure):
        raise JobFailed(storage.read_json(failure)["reason"])
    result = _result(plan, wall_s=time.perf_counter() - start)
    storage.write_json(storage.join(plan.folder, RESULT), result)
    return result


def _remove_damaged_snapshot(folder: str) -> None:
    """Ray Train overwrites its list of checkpoints in place: a kill meanwhile leaves half of it,
    which it then refuses. Without the list, `_work` goes on from the last whole checkpoint."""
    snapshot = storage.join(folder, "checkpoint_manager_snapshot.json")
    if storage.exists(snapshot):
        try:
            storage.read_json(snapshot)
        except ValueError:
            storage.remove(snapshot)


def _announcement(plan: Plan) -> str:
    config, model = plan.config, plan.config.model
    setting = f" ({model.setting})" if model.name == "custom_cnn" else ""
    size = model.input_size or plan.info.image_size
    verb = "resuming" if plan.resumes else "training"
    return (
        f"{verb} {model.name}{setting} at {size} px as run {plan.run!r}: "
        f"{plan.info.split('train').rows:,} images, {config.schedule.epochs} epochs, "
        f"batch {config.schedule.global_batch_size} over {config.scaling.num_workers} worker(s), "
        f"normalization {config.transforms.normalization}, "
        f"augmentation {config.transforms.augmentation}"
    )


def _check_resources(config: TrainConfig, say: Callable[[str], None]) -> None:
    """Refuses what this cluster can never schedule, instead of waiting for ever."""
    import ray

    scaling, has = config.scaling, ray.cluster_resources()
    wanted = {"CPU": scaling.num_workers * scaling.cpus_per_worker}
    if scaling.use_gpu:
        wanted["GPU"] = scaling.num_workers
    for kind, amount in wanted.items():
        if amount > has.get(kind, 0.0):
            flag = "--num-workers" if kind == "CPU" else "--use-gpu"
            message = f"{flag}: {amount:g} {kind}s wanted, the cluster has {has.get(kind, 0.0):g}"
            if not os.environ.get("RAY_ADDRESS"):
                raise UserError(f"{message}; fewer workers or a lower --cpus-per-worker fit")
            say(f"{message}: waiting for it to grow")


def _run_workers(plan: Plan) -> None:
    from ray.train import (
        CheckpointConfig,
        FailureConfig,
        LoggingConfig,
        RunConfig,
        ScalingConfig,
        TrainingFailedError,
    )
    from ray.train.torch import TorchConfig, TorchTrainer

    scaling = plan.config.scaling
    resources = {"CPU": scaling.cpus_per_worker}
    if scaling.use_gpu:
        resources["GPU"] = 1.0
    trainer = TorchTrainer(
        _work,
        train_loop_config={
            "config": plan.config.to_dict(),
            "run": plan.run,
            "folder": plan.folder,
        },
        scaling_config=ScalingConfig(
            num_workers=scaling.num_workers,
            use_gpu=scaling.use_gpu,
            resources_per_worker=resources,
        ),
        torch_config=TorchConfig(backend="nccl" if scaling.use_gpu else "gloo"),
        run_config=RunConfig(  # type: ignore[call-arg]
            name=plan.run,
            storage_path=plan.storage,
            logging_config=LoggingConfig(log_level="ERROR"),
            failure_config=FailureConfig(max_failures=scaling.max_failures),
            checkpoint_config=CheckpointConfig(
                # the last one is kept besides, whatever its score
                num_to_keep=1,
                checkpoint_score_attribute="validation_accuracy",
                checkpoint_score_order="max",
            ),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise JobFailed(
            f"run {plan.run} failed (the same command resumes it): {lines[-1]}"
        ) from error
    except SystemExit as error:  # what Ray Train makes of an interrupt
        raise KeyboardInterrupt from error


def _work(settings: dict[str, Any]) -> None:
    """One worker; runs in a process of its own, perhaps on another machine."""
    import ray.train
    import ray.train.torch
    import torch

    from fer_ray import checkpoint, loop

    logging.getLogger("ray.train").setLevel(logging.ERROR)
    config = TrainConfig.from_dict(settings["config"])
    scaling = config.scaling
    torch.set_num_threads(scaling.threads_per_worker or max(int(scaling.cpus_per_worker), 1))
    context = ray.train.get_context()
    rank = context.get_world_rank()
    group = loop.Group(
        rank=rank, size=context.get_world_size(), device=ray.train.torch.get_device()
    )
    info = read_info(config.data)
    splits = {name: load_split(info, name) for name in ("train", "validation")}
    with contextlib.ExitStack() as stack:
        resume = None
        if saved := ray.train.get_checkpoint():
            resume = checkpoint.read(stack.enter_context(saved.as_directory()))
        elif kept := checkpoint.in_run(settings["folder"]):
            resume = max(kept, key=lambda one: (one.epoch, one.place))
        if resume:
            _say(rank, f"going on after epoch {resume.epoch}")
        try:
            loop.train(
                config,
                info,
                splits,
                group=group,
                run=settings["run"],
                report=_reporter(rank, settings["folder"], config.schedule.epochs),
                provenance=provenance.describe(group.device),
                resume=resume,
            )
        except loop.NotFinite as error:
            # raised by all workers alike: a retry would end the same way, so there is none
            if rank == 0:
                storage.write_json(
                    storage.join(settings["folder"], _FAILURE), {"reason": str(error)}
                )


def _reporter(rank: int, folder: str, epochs: int) -> Callable[..., None]:
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
        _say(
            rank,
            f"epoch {row['epoch']}/{epochs}: train loss {row['train_loss']:.4f}, accuracy "
            f"{row['train_accuracy']:.2%}; validation loss {row['validation_loss']:.4f}, accuracy "
            f"{row['validation_accuracy']:.2%}, macro-F1 {row['validation_macro_f1']:.4f}; "
            f"{row['images_per_s']:,.0f} images/s, {row['seconds']:.1f} s",
        )

    return report


def _say(rank: int, message: str) -> None:
    if rank == 0:
        print(message, flush=True)


def _result(plan: Plan, *, wall_s: float) -> dict[str, Any]:
    """What ``run.json`` says, from the checkpoints."""
    from fer_ray import checkpoint

    kept = checkpoint.in_run(plan.folder)
    if not kept:
        raise JobFailed(f"{plan.folder}: the run ended without a checkpoint")
    best = checkpoint.find(plan.folder)
    last = max(kept, key=lambda one: one.epoch)
    write_history(storage.join(plan.folder, HISTORY), last.history)
    speeds = sorted(row["images_per_s"] for row in last.history)
    return {
        "run": plan.run,
        "model": asdict(plan.config.model),
        "best": best.metrics,
        "last": last.metrics,
        "best_checkpoint": storage.name_of(best.place),
        "checkpoint_sha256": best.sha256,
        "epochs": last.epoch,
        "train_s": sum(row["seconds"] for row in last.history),
        "wall_s": wall_s,
        "images_per_s": speeds[len(speeds) // 2],
        "seed": plan.config.schedule.seed,
        "num_workers": plan.config.scaling.num_workers,
        "data_sha256": plan.info.data_sha256,
        "git_commit": provenance.git_commit(),
        **last.provenance,
    }
