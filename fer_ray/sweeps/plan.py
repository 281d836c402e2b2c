"""What a sweep is asked to do, checked before Ray starts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fer_ray import storage
from fer_ray.config import overrides
from fer_ray.config.schema import DEFAULT_LEARNING_RATE, TrainConfig, differences
from fer_ray.data import object_store
from fer_ray.data.dataset import DatasetInfo
from fer_ray.errors import UserError
from fer_ray.models import registry
from fer_ray.sweeps import space as spaces
from fer_ray.sweeps import store
from fer_ray.sweeps.space import SEARCH, Space
from fer_ray.training import run as training

DEFAULT_SEEDS = 3
DEFAULT_TRIALS = 30


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a sweep may use; none of it changes a trial's result."""

    max_concurrent: int = 0
    """Trials at once; 0: as many as fit."""
    gpus_per_trial: float = 0.0
    """GPUs that each trial reserves; several trials share one where it is a fraction."""
    time_budget_s: float = 0.0
    """Stop after so many seconds, to go on another time; 0: no limit."""
    tensorboard: bool = False
    """Whether to write TensorBoard's files too."""


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """A sweep whose input has been checked."""

    config: TrainConfig
    """What all trials have in common; the data's place is absolute."""
    data: str
    """The data's place as it was given."""
    info: DatasetInfo
    space: Space
    seeds: tuple[int, ...]
    num_trials: int
    train_fraction: float
    """Share of the train split's images, of each class, that trials see."""
    storage: str
    """The folder of all sweeps: absolute local path or URI."""
    run: str
    """The sweep's name."""
    limits: Limits

    @property
    def folder(self) -> str:
        """The sweep's folder."""
        return storage.join(self.storage, self.run)

    def to_dict(self) -> dict[str, Any]:
        """The content of ``sweep.json``."""
        cost = self._cost(self.config)
        largest = overrides.changed(self.config, self.space.largest_model())
        varied = {one.model: one for one in (*self.space.configs(self.config), largest)}
        return {
            "format": store.FORMAT,
            "sweep": self.space.name,
            "run": self.run,
            "data": self.data,
            "data_sha256": self.info.data_sha256,
            "config": self.config.to_dict(),
            "seeds": list(self.seeds),
            "train_fraction": self.train_fraction,
            "train_images": self.train_images,
            "validation_images": _labelled(self.info, "validation"),
            "num_trials": self.num_trials,
            "parameters": cost.parameters,
            "multiply_adds": cost.multiply_adds,
            "most_parameters": max(self._cost(config).parameters for config in varied.values()),
            **self.space.to_dict(),
        }

    def _cost(self, config: TrainConfig) -> registry.Cost:
        size, labels = self.info.image_size, len(self.info.labels)
        model = registry.build(config.model, num_classes=labels, image_size=size)
        return registry.cost(model, config.model.input_size or size)

    @property
    def train_images(self) -> int:
        """Labelled images of the train split that trials see."""
        classes = self.info.split("train").classes.values()
        return sum(object_store.sample_size(count, self.train_fraction) for count in classes)


def _labelled(info: DatasetInfo, name: str) -> int:
    return info.split(name).rows - info.split(name).unlabelled


def plan(
    config: TrainConfig,
    *,
    sweep: str,
    storage_path: str,
    run: str | None = None,
    num_trials: int | None = None,
    num_seeds: int | None = None,
    train_fraction: float = 1.0,
    limits: Limits,
) -> SweepPlan:
    """Checks a sweep's input, without Ray.

    Args:
        config: what all trials have in common.
        sweep: a preset or a file.
        storage_path: the folder of all sweeps.
        run: the sweep's name; by default the preset's or the file's.
        num_trials: of a search.
        num_seeds: of a grid: from the configuration's seed on.
        train_fraction: above 0, at most 1.
        limits: what it may use.

    Raises:
        UserError: for anything that could not be trained, or a sweep of that name that has other
            settings.
    """
    data = config.data
    space = spaces.load(sweep, config)
    run = storage.check_name("--run", run or space.name)
    if config.schedule.loading == "stream":
        raise UserError("--loading stream: the trials of a sweep share the images in memory")
    if limits.gpus_per_trial:
        config = replace(config, scaling=replace(config.scaling, use_gpu=True))
        if config.scaling.num_workers > 1:
            raise UserError("--gpus-per-trial: with --num-workers each worker has a GPU: --use-gpu")
    storage.check_bucket("--storage", storage.absolute(storage_path))
    config, info = training.check(config)
    seeds, count = _counted(space, config, num_trials, num_seeds)
    made = SweepPlan(
        config=config,
        data=data,
        info=info,
        space=space,
        seeds=seeds,
        num_trials=count,
        train_fraction=train_fraction,
        storage=storage.absolute(storage_path),
        run=run,
        limits=limits,
    )
    if limits.tensorboard and storage.is_uri(made.folder):
        raise UserError(f"--tensorboard: writes to a local --storage only, not {made.storage}")
    _check_trials(made)
    _check_same(made)
    return made


def _counted(
    space: Space, config: TrainConfig, num_trials: int | None, num_seeds: int | None
) -> tuple[tuple[int, ...], int]:
    """The seeds and the number of trials."""
    first = config.schedule.seed
    if space.method == SEARCH:
        if num_seeds not in (None, 1):
            raise UserError("--seeds: a search trains each configuration once; a grid takes seeds")
        return (first,), num_trials or DEFAULT_TRIALS
    seeds = tuple(range(first, first + (num_seeds or DEFAULT_SEEDS)))
    count = len(space.arms) * len(seeds)
    if num_trials not in (None, count):
        raise UserError(
            f"--num-trials: {space.name} has {len(space.arms)} arms x {len(seeds)} seeds = "
            f"{count} trials; --seeds changes that, a search takes --num-trials"
        )
    return seeds, count


def _check_trials(plan: SweepPlan) -> None:
    """Refuses networks that cannot be built and batches that are too large."""
    size, labels = plan.info.image_size, len(plan.info.labels)
    configs = plan.space.configs(plan.config)
    for model in {config.model for config in configs} - {plan.config.model}:
        registry.check(model, num_classes=labels, image_size=size)
    batch = max(config.schedule.global_batch_size for config in configs)
    if batch > plan.train_images:
        raise UserError(
            f"--global-batch-size: {batch} is more than the {plan.train_images} images of "
            f"--train-fraction {plan.train_fraction:g} of the train split"
        )


def _check_same(plan: SweepPlan) -> None:
    """Refuses a sweep of that name with other settings; more seeds or trials are welcome."""
    if not storage.exists(storage.join(plan.folder, store.SWEEP)):
        return
    saved, asked = store.read_sweep(plan.folder), plan.to_dict()
    before = TrainConfig.from_dict(saved["config"]).to_dict()
    found = differences(before, plan.config.to_dict())
    for name in ("data_sha256", "train_fraction", "method", "arms", "space"):
        if saved.get(name) != asked.get(name):
            found.append(f"{name}: other than before")
    if "most_parameters" not in saved and _has_own_values(plan):
        found.append("version: it began when another preset or optimizer undid what is set beside")
    if saved["seeds"] != asked["seeds"][: len(saved["seeds"])]:
        found.append(f"seeds: {saved['seeds']} -> {asked['seeds']}, more but not fewer are allowed")
    elif saved["num_trials"] > asked["num_trials"]:
        found.append(
            f"num_trials: {saved['num_trials']} -> {asked['num_trials']}, more are allowed"
        )
    if found:
        raise UserError(
            f"--run: {plan.folder} exists with other settings ({'; '.join(found)}): give another "
            "name, or the same settings to go on with it"
        )


def _has_own_values(plan: SweepPlan) -> bool:
    """Whether something is set beside a preset or an optimizer that is varied."""
    named = {name for arm in plan.space.arms for name in arm.options} | set(plan.space.ranges)
    optimizer = plan.config.optimizer
    own_rate = optimizer.learning_rate != DEFAULT_LEARNING_RATE[optimizer.optimizer]
    return ("transforms.augmentation" in named and bool(overrides.own_magnitudes(plan.config))) or (
        "optimizer.optimizer" in named and own_rate
    )
