"""The plan of a sweep: its input, checked before Ray starts, and what it needs of the cluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fer_ray import storage
from fer_ray.config import overrides
from fer_ray.config.schema import TrainConfig, differences
from fer_ray.data import object_store
from fer_ray.data.dataset import DatasetInfo
from fer_ray.errors import UserError
from fer_ray.models import registry
from fer_ray.runtime import resources
from fer_ray.sweeps import space as spaces
from fer_ray.sweeps import store
from fer_ray.sweeps.halving import REDUCTION, Halving
from fer_ray.sweeps.space import GRID, SEARCH, Space
from fer_ray.sweeps.store import SweepFolder
from fer_ray.training import run as training
from fer_ray.training.worker import SPLITS

DEFAULT_SEEDS = 3
DEFAULT_TRIALS = 30
_OBJECT_STORE_FRACTION = 0.5
"""How much of a node's object store the images may fill; all its trials share them."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a sweep may use; none of it changes the result of a trial."""

    max_concurrent: int = 0
    """Most trials at a time; 0: as many as fit the cluster."""
    gpus_per_trial: float = 0.0
    """The fraction of a GPU that each trial reserves, at most 1; trials share it below 1. 0: none,
    or with `use_gpu` a GPU for each worker."""
    time_budget_s: float = 0.0
    """Seconds after which to stop, to be resumed later; 0: no limit."""
    tensorboard: bool = False
    """Whether to write TensorBoard's files too."""


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """A sweep whose input has been checked."""

    config: TrainConfig
    """The settings that all trials have in common; the path of the data is absolute."""
    data: str
    """The path of the data as the user gave it."""
    info: DatasetInfo
    space: Space
    seeds: tuple[int, ...]
    num_trials: int
    train_fraction: float
    """Fraction of the train split's images, of each class, that trials train on."""
    storage: str
    """The folder of all sweeps: absolute local path or URI."""
    run: str
    """The sweep's name."""
    limits: Limits

    @property
    def folder(self) -> str:
        """The path of the sweep's folder."""
        return storage.join(self.storage, self.run)

    @property
    def files(self) -> SweepFolder:
        """The files in the sweep's folder."""
        return SweepFolder(self.folder)

    def to_dict(self) -> dict[str, Any]:
        """The content of ``sweep.json`` but for ``fewer_seeds_before``."""
        cost = self._cost(self.config)
        largest = overrides.changed(self.config, self.space.largest_model())
        models = {config.model: config for config in (*self.space.configs(self.config), largest)}
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
            "validation_images": _num_labelled(self.info, "validation"),
            "num_trials": self.num_trials,
            "parameters": cost.parameters,
            "multiply_adds": cost.multiply_adds,
            "most_parameters": max(self._cost(config).parameters for config in models.values()),
            **self.space.to_dict(),
        }

    def _cost(self, config: TrainConfig) -> registry.Cost:
        size, labels = self.info.image_size, len(self.info.labels)
        model = registry.build(config.model, num_classes=labels, image_size=size)
        return registry.cost(model, config.model.input_size or size)

    @property
    def train_images(self) -> int:
        """Number of labelled images of the train split that trials train on."""
        classes = self.info.split("train").classes.values()
        return sum(object_store.stratum_size(count, self.train_fraction) for count in classes)


def _num_labelled(info: DatasetInfo, split: str) -> int:
    return info.split(split).rows - info.split(split).unlabelled


def plan_sweep(
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
    """Checks the input of a sweep, without Ray.

    Args:
        config: the settings that all trials have in common.
        sweep: a preset or the path of a file.
        storage_path: the folder of all sweeps.
        run: the sweep's name; by default that of the preset or the file.
        num_trials: of a search; 30 by default.
        num_seeds: of a grid, counted from the configuration's seed; 3 by default.
        train_fraction: above 0, at most 1.
        limits: what the sweep may use.

    Raises:
        UserError: for anything that could not be trained, or where a sweep of that name exists
            with other settings.
    """
    data, space = config.data, spaces.load(sweep, config)
    run = storage.check_name("--run", run or space.name)
    storage.check_bucket("--storage", storage.absolute(storage_path))
    config, info = training.check(_on_shared_images(config, limits))
    seeds, count = _seeds_and_trials(space, config, num_trials, num_seeds)
    plan = SweepPlan(
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
    if limits.tensorboard and storage.is_uri(plan.folder):
        raise UserError(f"--tensorboard: writes to a local --storage only, not {plan.storage}")
    _check_trials(plan)
    _check_same_settings(plan)
    return plan


def _on_shared_images(config: TrainConfig, limits: Limits) -> TrainConfig:
    """The settings for trials that share images in memory, and perhaps a GPU."""
    if config.schedule.loading == "stream":
        raise UserError("--loading stream: the trials of a sweep share the images in memory")
    if not limits.gpus_per_trial:
        return config
    if not 0 < limits.gpus_per_trial <= 1:
        raise UserError(
            f"--gpus-per-trial: {limits.gpus_per_trial:g} is not a number above 0, at most 1; for "
            "trials on several GPUs use --num-workers and --use-gpu"
        )
    if config.scaling.num_workers > 1:
        raise UserError(
            "--gpus-per-trial: with --num-workers each worker has a GPU; use --use-gpu instead"
        )
    return replace(config, scaling=replace(config.scaling, use_gpu=True))


def _seeds_and_trials(
    space: Space, config: TrainConfig, num_trials: int | None, num_seeds: int | None
) -> tuple[tuple[int, ...], int]:
    """The seeds and the number of trials."""
    first = config.schedule.seed
    if space.method == SEARCH:
        if num_seeds not in (None, 1):
            raise UserError(
                "--seeds: a search trains each configuration with one seed; only a grid takes more"
            )
        return (first,), num_trials or DEFAULT_TRIALS
    seeds = tuple(range(first, first + (num_seeds or DEFAULT_SEEDS)))
    count = len(space.arms) * len(seeds)
    if num_trials not in (None, count):
        raise UserError(
            f"--num-trials: {space.name} has {len(space.arms)} arms x {len(seeds)} seeds = "
            f"{count} trials; change it with --seeds (--num-trials is for a search)"
        )
    return seeds, count


def _check_trials(plan: SweepPlan) -> None:
    """Refuses networks that cannot be built and batches that are larger than the data."""
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


def _check_same_settings(plan: SweepPlan) -> None:
    """Refuses a name under which a sweep with other settings exists; it may grow, not shrink."""
    if not plan.files.exists:
        return
    saved, new = plan.files.read_settings(), plan.to_dict()
    saved_config = TrainConfig.from_dict(saved["config"]).to_dict()
    changes = differences(saved_config, plan.config.to_dict())
    for name in ("data_sha256", "train_fraction", "method", "arms", "space"):
        if saved.get(name) != new.get(name):
            changes.append(f"{name} has changed")
    if saved["seeds"] != new["seeds"][: len(saved["seeds"])]:
        changes.append(f"seeds: {saved['seeds']} -> {new['seeds']}, seeds can only be added")
    elif saved["num_trials"] > new["num_trials"]:
        changes.append(
            f"num_trials: {saved['num_trials']} -> {new['num_trials']}, trials can only be added"
        )
    if changes:
        raise UserError(
            f"--run: {plan.folder} exists with other settings ({'; '.join(changes)}): give another "
            "name, or the same settings to resume it"
        )


def announcement(plan: SweepPlan, halving: Halving, num_concurrent: int) -> str:
    """One line on what there is to do, and how much of it at a time."""
    epochs, space = plan.config.schedule.epochs, plan.space
    over = [trial for trial in halving.trials.values() if trial.is_over]
    done = sum(len(trial.history) for trial in halving.trials.values() if not trial.is_over)
    left = f"{halving.epochs_left({}):,} epochs to run"
    if space.method == GRID:
        size = (
            f"{len(space.arms)} arms x {len(plan.seeds)} seeds = {plan.num_trials} trials of "
            f"{epochs} epochs"
        )
    else:
        most = (plan.num_trials - len(over)) * epochs - done
        pauses = halving.rungs[:-1]
        size = f"{plan.num_trials} trials of at most {epochs} epochs"
        if pauses:
            size += f", of which ASHA promotes about one in {REDUCTION} after {_epochs(pauses)}"
            left = f"about {left}, at most {most:,}"
    text = (
        f"sweep {plan.run!r}: {size}, on {plan.train_images:,} images; "
        f"{num_concurrent} at a time; {left}"
    )
    if over or done:
        text += f" ({len(over)} trials are over, {done:,} epochs of the others are done)"
    return text


def _epochs(numbers: Sequence[int]) -> str:
    """Such as ``epochs 3 and 10``."""
    plural = "s" if len(numbers) > 1 else ""
    return f"epoch{plural} {' and '.join(map(str, numbers))}"


def resources_of_trial(plan: SweepPlan) -> dict[str, float]:
    """What one trial reserves, all its workers together."""
    scaling = plan.config.scaling
    amounts = {"CPU": scaling.num_workers * scaling.cpus_per_worker}
    if scaling.use_gpu:
        amounts["GPU"] = plan.limits.gpus_per_trial or float(scaling.num_workers)
    return amounts


def concurrent_trials(plan: SweepPlan, log: Callable[[str], None]) -> int:
    """How many trials may run at a time on the connected cluster, up to the autoscaler's maximum.

    A trial of one process has to fit a node; the workers of others may be spread over nodes.
    Trials that wait for resources make an autoscaler start nodes.

    Raises:
        UserError: where not a single trial will ever fit.
    """
    scaling = plan.config.scaling
    each, flag = resources_of_trial(plan), "--gpus-per-trial"
    if scaling.num_workers > 1:
        each = {name: amount / scaling.num_workers for name, amount in each.items()}
        flag = "--use-gpu"
    demand = resources.Demand(
        each=each,
        count=scaling.num_workers,
        flags={"CPU": "--cpus-per-worker", "GPU": flag},
        hint="less for each trial may fit",
    )
    nodes = resources.check(demand, log=log)
    fitting = max(resources.fitting(each, nodes) // scaling.num_workers, 1)
    most = min(plan.limits.max_concurrent or plan.num_trials, plan.num_trials)
    if fitting < most:
        grown = resources.fitting_at_maximum(each)
        if grown is None:
            log(
                f"{fitting} trials fit the cluster now; how far it may grow is not known: set "
                f"{resources.MAXIMUM}, or --max-concurrent N to let N trials wait for nodes"
            )
            return most if plan.limits.max_concurrent else fitting
        fitting = max(fitting, grown // scaling.num_workers)
    return min(fitting, most)


def share_images(plan: SweepPlan) -> dict[str, Any]:
    """References to the pixels and labels of each split; they are read once, one copy per node.

    Raises:
        UserError: for damaged files, or images that do not fit the object store.
    """
    import ray

    fractions = {"train": plan.train_fraction, "validation": 1.0}
    num_images = sum(plan.info.split(name).rows * fractions[name] for name in SPLITS)
    stores = [
        node["Resources"].get("object_store_memory", 0.0) for node in ray.nodes() if node["Alive"]
    ]
    bytes_per_image = plan.info.image_size**2
    size, available = num_images * bytes_per_image, _OBJECT_STORE_FRACTION * min(stores)
    if size > available:
        for_train = available - plan.info.split("validation").rows * bytes_per_image
        most = for_train / (plan.info.split("train").rows * bytes_per_image)
        hint = f"at most {most:.3g} fits" if most > 0 else "the validation split alone is larger"
        raise UserError(
            f"--train-fraction: the images take {size / 2**20:,.0f} MiB, but the trials of a node "
            f"can share {available / 2**20:,.0f} MiB; {hint}"
        )
    return object_store.shared_images(plan.info, fractions, seed=plan.config.schedule.seed)
