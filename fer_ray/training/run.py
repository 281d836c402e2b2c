"""A training run: `plan` it without Ray, then `fit` it, on Ray or in this process.

A run is a folder, ``<storage>/<run>/`` (`data.run_folder`): its workers keep the best checkpoint
and the last one there. The same name with the same settings resumes from the last checkpoint.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fer_ray import storage
from fer_ray.config.schema import ScalingConfig, TrainConfig, differences
from fer_ray.data import object_store, row_groups
from fer_ray.data.dataset import DatasetInfo, load_split, read_info
from fer_ray.data.row_groups import RowGroupSlice
from fer_ray.data.run_folder import RunFolder
from fer_ray.errors import JobFailed, UserError, first_line
from fer_ray.models import registry, run_checkpoints
from fer_ray.runtime import environment, resources
from fer_ray.runtime.process import is_kernel_fault
from fer_ray.training import batch_norm, local_worker, ray_trainer, worker
from fer_ray.training.worker import SPLITS
from fer_ray.transforms import albumentations_engine

_MEMORY_FRACTION = 0.3
"""The largest fraction of a node's object store that `--loading auto` fills with images."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A training run whose input has been checked."""

    config: TrainConfig
    """All settings; paths are absolute."""
    info: DatasetInfo
    """The prepared data set."""
    storage: str
    """The folder of all runs: absolute local path or URI."""
    run: str
    """The run's name."""
    resumes: bool
    """Whether the run's folder exists already, with the same settings."""
    local: bool = False
    """Whether to train in this process, without Ray."""

    @property
    def folder(self) -> str:
        """The run's folder: absolute local path or URI."""
        return storage.join(self.storage, self.run)

    @property
    def files(self) -> RunFolder:
        """The files of the run's folder."""
        return RunFolder(self.folder)

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.files.result is not None


def plan(config: TrainConfig, *, storage_path: str, run: str, local: bool = False) -> Plan:
    """Checks a run's input, without Ray.

    Raises:
        UserError: where the data set is missing or does not fit the settings, a run of that name
            exists with other settings, or the run needs Ray and is to do without.
    """
    storage.check_name("--run", run)
    config, info = check(config)
    path = storage.absolute(storage_path)
    storage.check_bucket("--storage", path)
    resumes = _check_same(config, info, storage.join(path, run))
    if local:
        local_worker.check(config, RunFolder(storage.join(path, run)))
    return Plan(config=config, info=info, storage=path, run=run, resumes=resumes, local=local)


def check(config: TrainConfig) -> tuple[TrainConfig, DatasetInfo]:
    """Checks that a data set suits the settings.

    Returns:
        The settings with absolute paths, and the data set.

    Raises:
        UserError: where the data set is missing or does not suit them.
    """
    albumentations_engine.check(config.transforms)
    config = _with_absolute_paths(config)
    info = read_info(config.data)
    for split in SPLITS:
        labelled = info.split(split).rows - info.split(split).unlabelled
        if not labelled:
            raise UserError(f"--data: {info.path} has no labelled images in its {split} split")
    batch = config.schedule.global_batch_size
    rows = info.split("train").rows - info.split("train").unlabelled
    if batch > rows:
        raise UserError(
            f"--global-batch-size: {batch} is more than the {rows} images of the train split"
        )
    model = registry.check(config.model, num_classes=len(info.labels), image_size=info.image_size)
    batch_norm.check(model, use_gpu=config.scaling.use_gpu)
    return config, info


def _with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Makes paths absolute: workers run in another working directory."""
    model = config.model.with_absolute_files()
    return dataclasses.replace(config, data=storage.absolute(config.data), model=model)


def _check_same(config: TrainConfig, info: DatasetInfo, folder: str) -> bool:
    """Returns whether the run exists already; refuses one with other settings or data."""
    saved = RunFolder(folder).config
    if saved is None:
        return False
    try:
        changes = differences(TrainConfig.from_dict(saved["config"]).to_dict(), config.to_dict())
    except (UserError, TypeError) as error:
        raise UserError(
            f"--run: the settings in {folder} cannot be read ({first_line(error)}): give another "
            "name"
        ) from error
    if saved["data_sha256"] != info.data_sha256:
        changes.append(f"data: {saved['config']['data']} -> {config.data} (other images)")
    if changes:
        raise UserError(
            f"--run: {folder} exists with other settings ({'; '.join(changes)}): give another "
            "name, or the same settings to resume it"
        )
    for saved_checkpoint in run_checkpoints.in_run(folder):
        saved_checkpoint.check_config(config)
    return True


def fit(plan: Plan, *, log: Callable[[str], None] = print) -> dict[str, Any]:
    """Trains, or resumes; a finished run is not trained again.

    Unless the plan is local, Ray has to be connected.

    Args:
        plan: from `plan`.
        log: receives lines of progress.

    Returns:
        The content of ``run.json``. ``train_s`` sums the seconds of all epochs; ``wall_s`` are
        those of the last session, start-up included.

    Raises:
        UserError: where the cluster cannot provide the workers, or files are damaged.
        JobFailed: where the loss is no longer finite, or workers failed too often.
    """
    files = plan.files
    if (result := files.result) is not None:
        log(f"run {plan.run} has finished already")
        return result
    if not plan.local:
        _check_resources(plan.config, log)
    streams = not plan.local and decide_loading(plan)
    log("reading the images")
    if not plan.local:
        ray_trainer.warm_up()
    feed = _feed_settings(plan, streams)
    files.write_config(
        plan.config.to_dict(),
        data_sha256=plan.info.data_sha256,
        loading="stream" if streams else "memory",
    )
    start = time.perf_counter()
    log(_announcement(plan, streams))
    if not plan.local:
        log(f"starting {plan.config.scaling.num_workers} worker(s)")
    _run_workers(plan, feed, log)
    result = _result(plan, wall_s=time.perf_counter() - start, log=log)
    files.write_result(result)
    return result


def _announcement(plan: Plan, streams: bool) -> str:
    config, model = plan.config, plan.config.model
    options = ", ".join(f"{name} {value}" for name, value in model.options().items())
    options = f" ({options})" if options else ""
    size = model.input_size or plan.info.image_size
    verb = "resuming" if plan.resumes else "training"
    return (
        f"{verb} {model.name}{options} at {size} px as run {plan.run!r}: "
        f"{plan.info.split('train').rows:,} images, {config.schedule.epochs} epochs, "
        f"batch {config.schedule.global_batch_size} over {config.scaling.num_workers} worker(s), "
        f"normalization {config.transforms.normalization}, "
        f"augmentation {config.transforms.augmentation}, loading "
        f"{'from a stream' if streams else 'into memory'} ({config.schedule.loading})"
    )


def _check_resources(config: TrainConfig, log: Callable[[str], None]) -> None:
    """Refuses what this cluster can never provide, instead of waiting for ever."""
    scaling = config.scaling
    demand = resources.Demand(
        each=_reserved(scaling),
        count=scaling.num_workers,
        flags={"CPU": "--num-workers", "GPU": "--use-gpu"},
        hint="fewer workers or a lower --cpus-per-worker fit",
    )
    resources.check(demand, log=log)


def _reserved(scaling: ScalingConfig) -> dict[str, float]:
    """What each worker reserves."""
    return {"CPU": scaling.cpus_per_worker} | ({"GPU": 1.0} if scaling.use_gpu else {})


def decide_loading(plan: Plan) -> bool:
    """Returns whether to stream the images; a resumed run loads as it did before.

    Raises:
        UserError: where streaming is requested or needed, and images have no label.
    """
    import ray

    chosen = plan.config.schedule.loading
    if (saved := plan.files.config) is not None:
        chosen = saved["loading"]
    if chosen == "auto":
        size = sum(plan.info.split(name).rows for name in SPLITS) * plan.info.image_size**2
        stores = [
            node["Resources"].get("object_store_memory", 0.0)
            for node in ray.nodes()
            if node["Alive"]
        ]
        chosen = "memory" if size <= _MEMORY_FRACTION * min(stores) else "stream"
    if chosen == "stream":
        for name in SPLITS:
            if unknown := plan.info.split(name).unlabelled:
                raise UserError(
                    f"--loading {plan.config.schedule.loading}: {unknown} images of the {name} "
                    "split have no label and cannot be streamed; leave them out when preparing, "
                    "or use --loading memory"
                )
    return chosen == "stream"


def _spare_cpus(scaling: ScalingConfig) -> float:
    """CPUs per worker that no worker reserves."""
    import ray

    free = ray.cluster_resources().get("CPU", 0.0) - scaling.num_workers * scaling.cpus_per_worker
    return max(free, 0.0) / scaling.num_workers


def _feed_settings(plan: Plan, streams: bool) -> dict[str, Any]:
    """The part of the workers' settings that says where the images are.

    Raises:
        UserError: for files that are damaged, or not those of the run that is resumed.
    """
    if streams:
        slices = {name: row_groups.row_group_slices(plan.info, name) for name in SPLITS}
        _check_row_groups(plan, slices)
        object_store.verify_parts(plan.info, SPLITS)
        return {"slices": slices, "spare_cpus": _spare_cpus(plan.config.scaling)}
    if plan.local:
        splits = {name: load_split(plan.info, name) for name in SPLITS}
        return {"images": {name: (split.images, split.labels) for name, split in splits.items()}}
    return {"images": object_store.shared_images(plan.info, dict.fromkeys(SPLITS, 1.0))}


def _check_row_groups(plan: Plan, slices: dict[str, list[RowGroupSlice]]) -> None:
    """Refuses to resume a stream from other row groups: the order of images would differ."""
    files = plan.files
    rows = {name: [one.end for one in split] for name, split in slices.items()}
    if plan.resumes and files.row_groups not in (None, rows):
        raise UserError(
            f"--data: {plan.info.path} was prepared again with other row groups after run "
            f"{plan.run!r} began to stream it: give another --run"
        )
    files.write_row_groups(rows)


def _run_workers(plan: Plan, feed: dict[str, Any], log: Callable[[str], None]) -> None:
    """Trains to the end; nodes whose GPU cannot be used are left out where others are enough."""
    settings = {"config": plan.config.to_dict(), "run": plan.run, "folder": plan.folder, **feed}
    avoided: set[str] = set()
    while failure := _try_workers(plan, settings, avoided):
        reason, node = plan.files.failure, plan.files.failed_node
        if not (reason and node and _fits_without(node, avoided, reason, plan.config.scaling)):
            raise failure
        avoided.add(node)
        log(f"{reason}: going on without this node")


def _try_workers(plan: Plan, settings: dict[str, Any], avoided: set[str]) -> JobFailed | None:
    """Trains on nodes that are not avoided; returns what ended it before the end, if anything."""
    files, scaling = plan.files, plan.config.scaling
    files.clear_failure()
    failed = f"run {plan.run} failed (the same command resumes it)"
    try:
        if plan.local:
            local_worker.run_worker(settings, use_gpu=scaling.use_gpu, failed=failed)
        else:
            ray_trainer.run_trainer(
                worker.work, settings, scaling, run=plan.run, failed=failed, avoid=avoided
            )
    except JobFailed as error:
        reason = files.failure
        return JobFailed(f"{error} ({reason})") if reason else error
    return JobFailed(reason) if (reason := files.failure) else None


def _fits_without(node: str, avoided: set[str], reason: str, scaling: ScalingConfig) -> bool:
    """Whether the workers fit other nodes than one whose GPU failed, and not by a computation."""
    if node in avoided or is_kernel_fault(reason):
        return False
    return resources.fits_beside(_reserved(scaling), {*avoided, node}, count=scaling.num_workers)


def _result(plan: Plan, *, wall_s: float, log: Callable[[str], None]) -> dict[str, Any]:
    """The content of ``run.json``, from the checkpoints."""
    last = run_checkpoints.latest(plan.folder)
    if last is None:
        raise JobFailed(f"{plan.folder}: the run ended without a checkpoint")
    best = run_checkpoints.find(plan.folder, allow_fallback=True, log=log)
    files = plan.files
    files.write_history(last.history)
    config = files.config
    assert config is not None
    return {
        "run": plan.run,
        "model": plan.config.model.to_dict(),
        "best": best.metrics,
        "last": last.metrics,
        "best_checkpoint": storage.name_of(best.path),
        "checkpoint_sha256": best.sha256,
        "epochs": last.epoch,
        "train_s": sum(row["seconds"] for row in last.history),
        "wall_s": wall_s,
        "images_per_s": statistics.median(row["images_per_s"] for row in last.history),
        "loading": config["loading"],
        "computed_in": last.computed_in,
        "seed": plan.config.schedule.seed,
        "num_workers": plan.config.scaling.num_workers,
        "data_sha256": plan.info.data_sha256,
        "git_commit": environment.git_commit(),
        **last.environment,
    }
