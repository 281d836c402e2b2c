"""What a sweep leaves on the disk, and how it knows what is still to do.

``<storage>/<run>/`` holds ``sweep.json`` (what was asked for), ``trials.parquet`` (one row a
trial and epoch), ``summary.json`` and a folder a trial, ``trials/00007/``: ``trial.json`` (its
options), ``history.parquet`` (its epochs so far), while it is unfinished its last checkpoint,
and once it is over ``end.json``. The folders are the truth, the tables
are made from them: a process that is killed at any moment leaves a trial that is over or one that
goes on.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from fer_ray import storage
from fer_ray.config import overrides
from fer_ray.config.schema import TrainConfig
from fer_ray.data import history as histories
from fer_ray.data.run_folder import RunFolder
from fer_ray.errors import UserError
from fer_ray.models import checkpoint
from fer_ray.models.checkpoint import Checkpoint

SWEEP = "sweep.json"
TRIALS = "trials.parquet"
SUMMARY = "summary.json"
FORMAT = 1
FINISHED, STOPPED, FAILED, UNFINISHED = "finished", "stopped", "failed", "unfinished"
"""What becomes of a trial: trained to its end, left behind by ASHA, failed, to go on."""

_FOLDER = "trials"
_TRIAL, _END = "trial.json", "end.json"

METRICS = (*histories.METRICS, "images_per_s", "seconds")
"""The columns that every epoch fills, as in ``history.parquet``."""


_ARROW_TYPES = {int: pa.int32(), float: pa.float64(), bool: pa.bool_(), str: pa.string()}


SCHEMA = pa.schema(
    [
        pa.field("trial", pa.int32(), nullable=False),
        pa.field("arm", pa.string()),
        *(
            pa.field(setting.column, _ARROW_TYPES[setting.type])
            for setting in overrides.settings().values()
        ),
        pa.field("epoch", pa.int32(), nullable=False),
        *(pa.field(metric, pa.float64()) for metric in METRICS),
        pa.field("ended_at", pa.timestamp("ms", tz="UTC")),
        pa.field("status", pa.string(), nullable=False),
        pa.field("stop_reason", pa.string()),
        *(pa.field(name, pa.string()) for name in ("hardware", "computed_in", "versions")),
    ]
)
"""The columns of every ``trials.parquet``."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial, as its folder tells."""

    number: int
    """From 0, in the order in which they were planned or suggested."""
    arm: str | None
    """Designed sweeps: the name of what differs."""
    options: dict[str, Any]
    """What differs from the sweep's base settings, by dotted name; the seed too."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One dict an epoch."""
    status: str = UNFINISHED
    reason: str | None = None
    """Why it was stopped, or failed."""
    ran_on: dict[str, str] = field(default_factory=dict)
    """Of trials that are over: `hardware`, `computed_in` and `versions` of its last epoch."""

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do."""
        return self.status != UNFINISHED

    def config(self, base: TrainConfig) -> TrainConfig:
        """All its settings."""
        return overrides.changed(base, self.options)


def folder_of(sweep: str, number: int) -> str:
    """A trial's folder."""
    return storage.join(sweep, _FOLDER, f"{number:05d}")


def create(sweep: str, trial: Trial) -> None:
    """Writes down a trial before it begins."""
    value = {"number": trial.number, "arm": trial.arm, "options": trial.options}
    storage.write_json(storage.join(folder_of(sweep, trial.number), _TRIAL), value)


def end(sweep: str, number: int, status: str, reason: str | None = None) -> None:
    """Writes down how a trial ended, and removes its checkpoint.

    What was written first stays: a trial that ended while its stop was on the way has ended.
    """
    folder = folder_of(sweep, number)
    path = storage.join(folder, _END)
    if not storage.exists(path):
        # the time is for whoever looks; nothing is computed from it
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        ended = {"status": status, "reason": reason, "at": at, "ran_on": _ran_on(folder)}
        storage.write_json(path, ended)
    RunFolder(folder).remove_checkpoints()


def _ran_on(folder: str) -> dict[str, str]:
    """What a trial was computed on and in, as its last checkpoint tells."""
    found = checkpoint.latest(folder)
    if not found:
        return {}
    hardware, versions = found.environment["hardware"], found.environment["versions"]
    device = hardware.get("gpu") or f"{hardware['processor']}, {hardware['cores']} cores"
    return {
        "hardware": f"{device}, {hardware['threads_per_worker']} thread(s) a worker",
        "computed_in": "bfloat16" if found.bfloat16 else "float32",
        "versions": f"torch {versions['torch']}, ray {versions['ray']}",
    }


def save(
    folder: str, epoch: int, history: list[dict[str, Any]], write: Callable[[Path], None]
) -> None:
    """Keeps a trial's checkpoint and history after an epoch, whole or not at all.

    Args:
        folder: of the trial.
        epoch: epochs that are done.
        history: their rows.
        write: writes the checkpoint into a local folder.
    """
    files = RunFolder(folder)
    files.save_checkpoint(epoch, write)
    files.write_history(history)
    files.remove_checkpoints(but={epoch})


def resume(folder: str) -> Checkpoint | None:
    """Where an unfinished trial goes on from; its history is made to match."""
    found = checkpoint.latest(folder)
    if found:  # a crash may have come between a checkpoint and its row
        RunFolder(folder).write_history(found.history)
    return found


def read_trial(sweep: str, number: int) -> Trial:
    """A trial as its folder tells."""
    folder = folder_of(sweep, number)
    value = storage.read_json(storage.join(folder, _TRIAL))
    table = RunFolder(folder).read_history()
    ended: dict[str, Any] = {"status": UNFINISHED, "reason": None}
    if storage.exists(storage.join(folder, _END)):
        ended = storage.read_json(storage.join(folder, _END))
    return Trial(
        **value,
        history=table.to_pylist() if table else [],
        status=ended["status"],
        reason=ended["reason"],
        ran_on=ended.get("ran_on", {}),
    )


def read_all(sweep: str) -> list[Trial]:
    """Every trial that was written down, by number."""
    names = storage.list_names(storage.join(sweep, _FOLDER))
    return [
        read_trial(sweep, int(name))
        for name in names
        if name.isdigit() and storage.exists(storage.join(sweep, _FOLDER, name, _TRIAL))
    ]


def rows(trials: Iterable[Trial], base: TrainConfig) -> list[dict[str, Any]]:
    """The rows of ``trials.parquet``; a trial that failed before its first epoch has one too."""
    found = []
    for trial in trials:
        around = {
            "trial": trial.number,
            "arm": trial.arm,
            **overrides.values_of(trial.config(base)),
            "status": trial.status,
            "stop_reason": trial.reason,
            **trial.ran_on,
        }
        if trial.history:
            found += [{**around, **_epoch(row)} for row in trial.history]
        elif trial.is_over:
            found.append({**around, "epoch": 0})
    return found


def measured(row: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of an epoch: `METRICS`, then further registered metrics."""
    return {name: row[name] for name in (*METRICS, *histories.added_metrics(row))}


def _epoch(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"epoch": row["epoch"], **measured(row), "ended_at": row.get("ended_at")}


def schema(names: Iterable[str]) -> pa.Schema:
    """The columns of a ``trials.parquet``: `SCHEMA`, then those of further metrics.

    Args:
        names: keys of the histories' rows.
    """
    return pa.schema([*SCHEMA, *((name, pa.float64()) for name in histories.added_metrics(names))])


def table(trials: Iterable[Trial], base: TrainConfig) -> pa.Table:
    """The content of ``trials.parquet``."""
    trials = list(trials)
    names = (name for trial in trials for row in trial.history for name in row)
    return pa.Table.from_pylist(rows(trials, base), schema=schema(names))


def write_trials(sweep: str, base: TrainConfig) -> list[Trial]:
    """Makes ``trials.parquet`` from the trials' folders; returns the trials."""
    trials = read_all(sweep)
    sink = pa.BufferOutputStream()
    pq.write_table(table(trials, base), sink)
    storage.write_bytes(storage.join(sweep, TRIALS), sink.getvalue().to_pybytes())
    return trials


def read_trials(sweep: str) -> pd.DataFrame:
    """The content of ``trials.parquet``, by trial and epoch.

    Raises:
        UserError: where the folder is no sweep.
    """
    content = storage.read_bytes(storage.join(_checked(sweep, TRIALS), TRIALS))
    frame = pq.read_table(io.BytesIO(content)).to_pandas()
    return frame.sort_values(["trial", "epoch"], ignore_index=True)


def read_sweep(sweep: str) -> dict[str, Any]:
    """The content of ``sweep.json``.

    Raises:
        UserError: where the folder is no sweep.
    """
    value = storage.read_json(storage.join(_checked(sweep, SWEEP), SWEEP))
    if value.get("format") != FORMAT:
        raise UserError(f"{sweep}: a sweep of another version of this project")
    return value


def _checked(sweep: str, name: str) -> str:
    path = storage.absolute(sweep)
    if not storage.exists(storage.join(path, name)):
        raise UserError(f"{path}: not a sweep: {name} is missing; a folder of jobs/tune.py's run")
    return path
