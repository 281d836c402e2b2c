"""Plans a benchmark: checks its settings, without Ray."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fer_ray import storage
from fer_ray.benchmarks.targets import KEYS
from fer_ray.config.schema import TrainConfig
from fer_ray.data.dataset import DatasetInfo, read_info
from fer_ray.data.labels import FER2013_LABELS
from fer_ray.errors import UserError, unknown
from fer_ray.models import registry

ROUNDS = 5
ROUND_S = 3.0
IMAGE_SIZE = 48
"""Pixels a side of the synthetic faces that are measured where there is no data set."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The valid settings of a benchmark, as `plan` returns them."""

    config: TrainConfig
    """What is measured. Its `data` is an absolute path or URI; empty: synthetic faces."""
    keys: tuple[str, ...]
    """The numbers to measure, of `KEYS`."""
    rounds: int
    """Number of rounds of each series."""
    round_s: float
    """Seconds of a round, approximately."""
    output: str
    """Absolute path or URI of the JSON file; empty: none is written."""
    profile: str
    """Absolute path or URI of the trace of some training steps; empty: none is written."""
    to_accuracy: tuple[float, ...]
    """Validation accuracies in percent that a training is timed to reach; empty: none is run."""

    @property
    def reports_steps(self) -> bool:
        """Whether training steps are profiled: on GPUs always, where training is measured."""
        on_gpu = self.config.scaling.use_gpu
        return bool(self.profile) or (on_gpu and any(KEYS[k].needs == "train" for k in self.keys))


def plan(
    config: TrainConfig,
    *,
    output: str = "",
    only: Iterable[str] = (),
    profile: str = "",
    to_accuracy: Sequence[float] = (),
    rounds: int = ROUNDS,
    round_s: float = ROUND_S,
) -> Plan:
    """Checks the settings, without Ray.

    Args:
        config: what to measure; without `data`, on synthetic faces.
        output: path or URI of the JSON file; empty: none is written.
        only: names of `KEYS` to measure; empty: all that describe the model, or none where
            `profile` or `to_accuracy` asks for something else.
        profile: path or URI for a trace of some training steps; empty: none is written.
        to_accuracy: validation accuracies in percent, above 0 and at most 100.
        rounds: of each series, 1 or more.
        round_s: seconds of a round, above 0.

    Raises:
        UserError: if a setting is wrong.
    """
    keys = _selected(set(only), by_default=not (profile or to_accuracy))
    _check_rounds(rounds, round_s)
    if "workers_over_limit" in keys and config.scaling.num_workers < 2:
        raise UserError(
            "--num-workers: workers_over_limit needs 2 or more workers; list other numbers "
            "with --only"
        )
    labels, size = len(FER2013_LABELS), IMAGE_SIZE
    if config.data:
        info = read_info(config.data)
        _check_data(info, keys)
        if to_accuracy:
            _check_batch(info, config.schedule.global_batch_size)
        config, labels, size = replace(config, data=info.path), len(info.labels), info.image_size
    config = replace(config, model=config.model.with_absolute_files())
    registry.check(config.model, num_classes=labels, image_size=size)
    return Plan(
        config=config,
        keys=keys,
        rounds=rounds,
        round_s=round_s,
        output=_checked_file("--output", output),
        profile=_checked_file("--profile", profile),
        to_accuracy=tuple(to_accuracy),
    )


def _selected(only: set[str], *, by_default: bool) -> tuple[str, ...]:
    for key in only:
        if key not in KEYS:
            raise unknown("--only", key, KEYS)
    everything = by_default and not only
    return tuple(key for key in KEYS if key in only or (KEYS[key].of_model and everything))


def _check_rounds(rounds: int, round_s: float) -> None:
    if rounds < 1 or not 0 < round_s < math.inf:
        raise UserError(
            f"--rounds {rounds}, --round-s {round_s:g}: both must be above 0 and finite"
        )


def _check_data(info: DatasetInfo, keys: Sequence[str]) -> None:
    for name in ("train", "validation"):
        split = info.split(name)
        if split.rows == split.unlabelled:
            raise UserError(f"--data: {info.path} has no labelled images in its {name} split")
        if split.unlabelled and "stream_over_naive" in keys:
            raise UserError(
                f"--data: {split.unlabelled} images of {name} have no label and cannot be "
                "streamed; list numbers other than stream_over_naive with --only"
            )


def _check_batch(info: DatasetInfo, batch_size: int) -> None:
    train = info.split("train")
    if batch_size > train.rows - train.unlabelled:
        raise UserError(
            f"--global-batch-size: {batch_size} is more than the {train.rows - train.unlabelled} "
            "labelled images of the train split; --to-accuracy needs at least one batch"
        )


def _checked_file(flag: str, path: str) -> str:
    """The absolute path or URI of a file that can be written; empty where there is none."""
    path = storage.absolute(path) if path else ""
    if not path or storage.is_uri(path):
        storage.check_bucket(flag, path)
        return path
    if Path(path).is_dir():
        raise UserError(f"{flag}: {path} is a folder; give the path of a file")
    above = next(folder for folder in Path(path).parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"{flag}: {above} is not a writable folder; give another path")
    return path
