"""A sweep's winner as settings: to show, to paste as a command, to take for a training run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from fer_ray import storage
from fer_ray.config import overrides
from fer_ray.config.schema import TrainConfig
from fer_ray.errors import UserError
from fer_ray.sweeps import store
from fer_ray.sweeps.importance import plain


def run_name(sweep: str) -> str:
    """The name of the run that trains a sweep's winner."""
    return f"{sweep}-winner"


def config_of(row: pd.Series, base: TrainConfig) -> TrainConfig:
    """The settings of a trial.

    Args:
        row: one of ``trials.parquet``.
        base: what the columns do not say: the data, and where the work runs.
    """
    values: dict[str, Any] = {**base.to_dict(), "model": {}}
    for setting in overrides.settings().values():
        value = plain(row[setting.column])
        if value is not None:  # else an option of another network
            values[setting.section][setting.field] = setting.type(value)
    return TrainConfig.from_dict(values)


def described(
    config: TrainConfig, chosen: Mapping[str, Any], sweep: Mapping[str, Any]
) -> dict[str, Any]:
    """The part of ``summary.json`` that tells a winner's settings.

    Args:
        config: all its settings.
        chosen: by dotted name, what the sweep varied.
        sweep: the content of ``sweep.json``.
    """
    values = overrides.values_of(config)
    return {
        "options": dict(chosen),
        "settings": {name: values[column] for column, name in overrides.columns().items()},
        "command": overrides.as_command(config, run=run_name(sweep["run"])),
    }


def read(folder: str) -> tuple[str, dict[str, Any]]:
    """What ``summary.json`` says of the winner.

    Returns:
        A name for the run that trains it, and every setting's value by dotted name.

    Raises:
        UserError: where there is no summary, or no trial had finished.
    """
    path = storage.join(storage.absolute(folder), store.SUMMARY)
    if not storage.exists(path):
        raise UserError(
            f"--from-sweep: {folder}: {store.SUMMARY} is missing; a folder of jobs/tune.py's "
            "run is expected"
        )
    made = storage.read_json(path)
    if not isinstance(made, dict) or "winner" not in made:
        raise UserError(f"--from-sweep: {folder}: {store.SUMMARY} is not of a sweep")
    if made["winner"] is None:
        raise UserError(f"--from-sweep: {folder}: no trial of this sweep has finished")
    return run_name(made["run"]), made["winner"]["settings"]
