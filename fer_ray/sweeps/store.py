"""The files of a sweep: the one place that knows their names, and reads and writes them.

``<storage>/<run>/`` holds ``sweep.json`` (the settings of the sweep), ``trials.parquet`` (one row
per trial and epoch), ``summary.json`` and one folder per trial, ``trials/00007/``: ``trial.json``
(its options), ``history.parquet`` (its epochs so far), its last checkpoint while it is unfinished,
``end.json`` once it is over, and ``error.txt`` after an unexpected exception.

The trials' folders are the source of truth and the tables are derived from them, so a process that
is killed at any moment leaves each trial either over or ready to resume.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from fer_ray.data import parquet
from fer_ray.data.json_values import Record
from fer_ray.data.run_folder import RunFolder
from fer_ray.errors import UserError, first_line
from fer_ray.models import run_checkpoints
from fer_ray.models.checkpoint import Checkpoint

SWEEP = "sweep.json"
TRIALS = "trials.parquet"
SUMMARY = "summary.json"
FORMAT = 1
FINISHED, STOPPED, FAILED, UNFINISHED = "finished", "stopped", "failed", "unfinished"
"""The status of a trial: trained to its end, not promoted by ASHA, failed, not over yet."""

_FOLDER = "trials"
_TRIAL, _END, _ERROR = "trial.json", "end.json", "error.txt"

METRICS = (*histories.METRICS, "images_per_s", "seconds")
"""The columns that every epoch fills, as in ``history.parquet``."""


_ARROW_TYPES = {int: pa.int32(), float: pa.float64(), bool: pa.bool_(), str: pa.string()}


def schema(names: Iterable[str] = ()) -> pa.Schema:
    """The columns of ``trials.parquet``: every setting, then what was measured.

    Args:
        names: keys of the histories' rows, which may have further metrics.
    """
    settings = overrides.settings().values()
    return pa.schema(
        [
            pa.field("trial", pa.int32(), nullable=False),
            pa.field("arm", pa.string()),
            *(pa.field(setting.column, _ARROW_TYPES[setting.type]) for setting in settings),
            pa.field("epoch", pa.int32(), nullable=False),
            *(pa.field(metric, pa.float64()) for metric in METRICS),
            pa.field("ended_at", pa.timestamp("ms", tz="UTC")),
            pa.field("status", pa.string(), nullable=False),
            pa.field("stop_reason", pa.string()),
            *(pa.field(name, pa.string()) for name in ("hardware", "computed_in", "versions")),
            *(pa.field(name, pa.float64()) for name in histories.added_metrics(names)),
        ]
    )


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial, as its folder records it."""

    number: int
    """From 0, in the order in which the trials were planned or suggested."""
    arm: str | None
    """The name of its arm in a grid; None in a search."""
    options: dict[str, Any]
    """The settings that differ from the sweep's base settings, by dotted name; the seed too."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One dict per epoch: the rows of ``history.parquet``."""
    status: str = UNFINISHED
    reason: str | None = None
    """Why it was stopped, failed, or finished before its last epoch."""
    ran_on: dict[str, str] = field(default_factory=dict)
    """`hardware`, `computed_in` and `versions` of its last epoch; empty until it is over."""

    @property
    def is_over(self) -> bool:
        """Whether it will not be trained further."""
        return self.status != UNFINISHED

    def config(self, base: TrainConfig) -> TrainConfig:
        """All settings of the trial."""
        return overrides.changed(base, self.options)


@dataclass(frozen=True)
class TrialFolder:
    """The files of one trial."""

    sweep: str
    """The sweep's folder."""
    number: int

    @property
    def path(self) -> str:
        """The folder: local path or URI."""
        return storage.join(self.sweep, _FOLDER, f"{self.number:05d}")

    @property
    def run(self) -> str:
        """The name of the trial in log lines, metrics and checkpoints."""
        return f"{storage.name_of(self.sweep)}-{self.number:05d}"

    @property
    def files(self) -> RunFolder:
        """Its checkpoints, history and failure, as of any run."""
        return RunFolder(self.path)

    def _file(self, name: str) -> str:
        return storage.join(self.path, name)

    def _history(self) -> list[dict[str, Any]]:
        table = self.files.read_history()
        return table.to_pylist() if table else []

    @property
    def exists(self) -> bool:
        """Whether the trial was created."""
        return storage.exists(self._file(_TRIAL))

    def read(self) -> Trial:
        """The trial as its folder records it."""
        record = Record(self._file(_TRIAL), storage.read_json(self._file(_TRIAL)))
        end = Record("", {"status": UNFINISHED, "reason": None, "ran_on": {}})
        if storage.exists(self._file(_END)):
            end = Record(self._file(_END), storage.read_json(self._file(_END)))
        return Trial(
            number=record.integer("number", self.number, self.number),
            arm=record.get("arm", "a text or null", _is_text_or_null),
            options=record.record("options").value,
            history=self._history(),
            status=end.text("status"),
            reason=end.get("reason", "a text or null", _is_text_or_null),
            ran_on=end.record("ran_on").value if "ran_on" in end.value else {},
        )

    def save(self, history: list[dict[str, Any]], write: Callable[[Path], None]) -> None:
        """Keeps the checkpoint and the history after an epoch, and removes older checkpoints.

        Args:
            history: one row per epoch.
            write: writes the checkpoint into a local folder.
        """
        self.files.save_checkpoint(len(history), write)
        self.files.write_history(history)
        self.files.remove_checkpoints(but={len(history)})

    def resume(self, log: Callable[[str], None]) -> Checkpoint | None:
        """The checkpoint to resume from; None: train from the first epoch.

        Damaged checkpoints are passed over. The history is made to match the checkpoint: a crash
        may have come between the checkpoint and its row, and epochs whose checkpoint is damaged
        are trained again.

        Args:
            log: receives a line where epochs are trained again.
        """
        latest = run_checkpoints.latest(self.path)
        epochs = latest.history if latest else []
        lost = len(self._history()) - len(epochs)
        if lost > 0:
            log(
                f"{self.run}: no undamaged checkpoint after epoch {len(epochs) + lost}: "
                f"training again from epoch {len(epochs) + 1}"
            )
        if lost:
            self.files.write_history(epochs)
        return latest

    def end(self, status: str, reason: str | None = None) -> None:
        """Records how the trial ended, and removes its checkpoint.

        The first record stays: a trial may end by itself while it is being stopped.
        """
        if not storage.exists(self._file(_END)):
            # for readers; nothing is computed from it
            at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            value = {"status": status, "reason": reason, "at": at, "ran_on": self._ran_on()}
            storage.write_json(self._file(_END), value)
        self.files.remove_checkpoints()

    def _ran_on(self) -> dict[str, str]:
        """Hardware, precision and versions of the last epoch, from the index of its checkpoint.

        The index has its own file, so it does not matter here whether the tensors are damaged.
        """
        checkpoints = run_checkpoints.in_run(self.path)
        if not checkpoints:
            return {}
        last = max(checkpoints, key=lambda candidate: candidate.epoch)
        hardware, versions = last.environment["hardware"], last.environment["versions"]
        device = hardware.get("gpu") or f"{hardware['processor']}, {hardware['cores']} cores"
        return {
            "hardware": f"{device}, {hardware['threads_per_worker']} thread(s) a worker",
            "computed_in": last.computed_in,
            "versions": f"torch {versions['torch']}, ray {versions['ray']}",
        }

    def keep_traceback(self, text: str) -> None:
        """Keeps the traceback of an unexpected exception, if the folder can still be written."""
        with contextlib.suppress(OSError):
            storage.write_bytes(self._file(_ERROR), text.encode())


@dataclass(frozen=True)
class SweepFolder:
    """The files of one sweep."""

    path: str
    """The folder: local path or URI."""

    def trial(self, number: int) -> TrialFolder:
        """The files of one of its trials."""
        return TrialFolder(self.path, number)

    def create(self, trial: Trial) -> None:
        """Records a trial before it begins."""
        value = {"number": trial.number, "arm": trial.arm, "options": trial.options}
        storage.write_json(storage.join(self.trial(trial.number).path, _TRIAL), value)

    def trials(self) -> list[Trial]:
        """Every trial that was created, by number."""
        names = storage.list_names(storage.join(self.path, _FOLDER))
        folders = [self.trial(int(name)) for name in names if name.isdigit()]
        return [folder.read() for folder in folders if folder.exists]

    @property
    def exists(self) -> bool:
        """Whether there is a sweep."""
        return storage.exists(storage.join(self.path, SWEEP))

    def write_settings(self, value: Mapping[str, Any]) -> None:
        """Writes ``sweep.json``."""
        storage.write_json(storage.join(self.path, SWEEP), value)

    def read_settings(self) -> dict[str, Any]:
        """The content of ``sweep.json``.

        Raises:
            UserError: where the folder is not a sweep's, or of another version.
        """
        path = self._checked(SWEEP)
        record = Record(path, storage.read_json(path))
        if record.integer("format") != FORMAT:
            raise UserError(f"{self.path}: this sweep was written by another version of fer_ray")
        for name in ("sweep", "run", "data", "data_sha256", "method"):
            record.text(name)
        for name in ("parameters", "multiply_adds", "train_images", "validation_images"):
            record.integer(name)
        record.integer("num_trials", 1), record.number("train_fraction", 0.0, 1.0)
        record.list("seeds"), record.list("fewer_seeds_before")
        try:
            TrainConfig.from_dict(record.record("config").value)
        except (UserError, TypeError) as error:
            raise record.error(f"config: {first_line(error)}") from error
        return record.value

    def write_table(self, base: TrainConfig) -> list[Trial]:
        """Writes ``trials.parquet`` from the trials' folders, and returns the trials.

        Args:
            base: the settings that all trials have in common.
        """
        trials = self.trials()
        sink = pa.BufferOutputStream()
        pq.write_table(table(trials, base), sink)
        storage.write_bytes(storage.join(self.path, TRIALS), sink.getvalue().to_pybytes())
        return trials

    def read_table(self) -> pd.DataFrame:
        """The content of ``trials.parquet``, by trial and epoch; missing columns are null.

        Raises:
            UserError: where the folder is not a sweep's.
        """
        path = self._checked(TRIALS)
        frame = parquet.parse(storage.read_bytes(path), path).to_pandas()
        missing = [name for name in schema().names if name not in frame]
        frame = frame.reindex(columns=[*frame.columns, *missing])
        return frame.sort_values(["trial", "epoch"], ignore_index=True)

    def write_summary(self, value: Mapping[str, Any]) -> None:
        """Writes ``summary.json``."""
        storage.write_json(storage.join(storage.absolute(self.path), SUMMARY), value)

    def read_summary(self) -> Any:
        """The content of ``summary.json``.

        Raises:
            UserError: where the folder is not a sweep's.
        """
        return storage.read_json(self._checked(SUMMARY))

    def _checked(self, name: str) -> str:
        """The path of one of the files above, which has to be there."""
        path = storage.join(storage.absolute(self.path), name)
        if not storage.exists(path):
            raise UserError(
                f"{storage.absolute(self.path)}: not a sweep: {name} is missing; give the folder "
                "of a run of jobs/tune.py"
            )
        return path


def _is_text_or_null(value: Any) -> bool:
    return value is None or isinstance(value, str)


def table(trials: Sequence[Trial], base: TrainConfig) -> pa.Table:
    """The content of ``trials.parquet``.

    Args:
        trials: every trial of the sweep.
        base: the settings that all trials have in common.
    """
    names = (name for trial in trials for row in trial.history for name in row)
    return pa.Table.from_pylist(rows(trials, base), schema=schema(names))


def rows(trials: Iterable[Trial], base: TrainConfig) -> list[dict[str, Any]]:
    """The rows of ``trials.parquet``; a trial that failed in its first epoch has one too."""
    table_rows = []
    for trial in trials:
        shared = {
            "trial": trial.number,
            "arm": trial.arm,
            **overrides.values_of(trial.config(base)),
            "status": trial.status,
            "stop_reason": trial.reason,
            **trial.ran_on,
        }
        if trial.history:
            table_rows += [{**shared, **_epoch(row)} for row in trial.history]
        elif trial.is_over:
            table_rows.append({**shared, "epoch": 0})
    return table_rows


def measured(row: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of an epoch: `METRICS`, then further registered metrics."""
    return {name: row[name] for name in (*METRICS, *histories.added_metrics(row))}


def _epoch(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"epoch": row["epoch"], **measured(row), "ended_at": row.get("ended_at")}
