"""The progress of a running sweep: a live table, lines that stay, TensorBoard's files."""

from __future__ import annotations

import contextlib
import pickle
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ray.exceptions import RayActorError
from ray.tune import Callback

from fer_ray.config.schema import TrainConfig
from fer_ray.errors import first_line
from fer_ray.models.checkpoint import SCORE
from fer_ray.sweeps import store
from fer_ray.sweeps.halving import Halving
from fer_ray.sweeps.losses import Losses
from fer_ray.sweeps.sentences import duration
from fer_ray.sweeps.store import SweepFolder, Trial
from fer_ray.sweeps.trial import free_workers

_DRAW_ON_TERMINAL_EVERY_S = 2.0
_DRAW_IN_LOG_EVERY_S = 30.0
_WRITE_TABLE_EVERY_S = 60.0
_FREE_WORKERS_FOR_S = 20.0
_SHORTEST_ESTIMATE_S = 5.0
"""Before, the epochs per second are too uncertain for an estimate."""


class Progress(Callback):
    """Follows the trials of one session, through their files and reports."""

    def __init__(
        self,
        files: SweepFolder,
        base: TrainConfig,
        halving: Halving,
        losses: Losses,
        *,
        log: Callable[[str], None],
    ) -> None:
        """Starts from the trials of earlier sessions.

        Args:
            files: of the sweep.
            base: the settings that all trials have in common.
            halving: the state of the sweep.
            losses: those of this session.
            log: receives the lines that stay.
        """
        self._files, self._base, self._log = files, base, log
        self._halving, self._losses = halving, losses
        self._trials = dict(halving.trials)
        self._running: dict[int, dict[str, Any]] = {}  # last rows by number
        self._until: dict[int, int] = {}
        self._is_terminal = sys.stdout.isatty()
        self._num_lines_drawn = 0
        self._drawn_at = self._table_written_at = time.monotonic()
        self._first_epoch_at: float | None = None
        self._num_epochs = 0
        self._interrupted = False
        self._free_until: dict[int, float] = {}
        self._freed_at = 0.0

    def interrupt(self) -> None:
        """Ends the session at the next step of Ray Tune."""
        self._interrupted = True

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        number = trial.config["number"]
        self._free_until.pop(number, None)  # from now on its workers are new ones
        self._trials[number] = self._files.trial(number).read()
        history = self._trials[number].history
        self._running[number] = dict(history[-1]) if history else {"epoch": 0}
        self._until[number] = trial.config["until"]

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self._running[trial.config["number"]] = result
        self._first_epoch_at = self._first_epoch_at or time.monotonic() - result["seconds"]
        self._num_epochs += 1

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._ended(trial.config["number"])

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Records a loss: the trial has failed, or is trained again by another job."""
        number, error = trial.config["number"], _cause(_last_error(trial))
        reason, folder = _reason_of(error), self._files.trial(number)
        if is_retried := self._losses.record(number, error):
            self._log(f"{_name(self._trials[number])} was interrupted: {reason}")
        else:
            folder.end(store.FAILED, reason)
        self._halving.ended(folder.read())
        self._ended(number, is_retried=is_retried)

    def on_step_end(self, iteration: int, trials: Any, **info: Any) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        now = time.monotonic()
        if self._free_until and now - self._freed_at >= 1:
            self._freed_at = now
            self._free_workers(now)
        every = _DRAW_ON_TERMINAL_EVERY_S if self._is_terminal else _DRAW_IN_LOG_EVERY_S
        if now - self._drawn_at >= every:
            self._drawn_at = now
            self._draw()
        if now - self._table_written_at >= _WRITE_TABLE_EVERY_S:
            self._files.write_table(self._base)
            self._table_written_at = time.monotonic()

    def _ended(self, number: int, *, is_retried: bool = False) -> None:
        self._running.pop(number, None)
        trial = self._trials[number] = self._files.trial(number).read()
        until = self._until.pop(number, self._halving.rungs[-1])
        is_complete = trial.is_over or len(trial.history) >= until
        was_killed = trial.status == store.FAILED or not is_complete or is_retried
        # not for a paused trial, which has no workers any more
        if was_killed and self._base.scaling.num_workers > 1:
            self._free_until[number] = time.monotonic() + _FREE_WORKERS_FOR_S
        if not is_complete:  # it is retried, or the time budget is used up
            return
        self._erase()
        self._log(line_of(trial))
        self._draw()

    def _free_workers(self, now: float) -> None:
        """Repeated for some seconds, since a trial that is being killed may start workers."""
        for number, until in list(self._free_until.items()):
            free_workers(self._files.trial(number))
            if now > until:
                del self._free_until[number]

    def close(self) -> None:
        """Removes the table from a terminal."""
        self._erase()

    def _draw(self) -> None:
        self._erase()
        lines = self.table()
        if self._is_terminal:
            # a line that wraps would count as two when it is erased
            width = shutil.get_terminal_size().columns - 1
            print("\n".join(line[:width] for line in lines), flush=True)
            self._num_lines_drawn = len(lines)
        else:
            for line in lines:
                self._log(line)

    def _erase(self) -> None:
        if self._num_lines_drawn:
            print(f"\x1b[{self._num_lines_drawn}F\x1b[J", end="", flush=True)
            self._num_lines_drawn = 0

    def table(self) -> list[str]:
        """One line per running trial, then one with the counts and the estimated end."""
        lines = [self._row(number, row) for number, row in sorted(self._running.items())]
        over = [trial for trial in self._trials.values() if trial.is_over]
        counts = [f"{len(over)} of {self._halving.num_trials} trials over"]
        paused = len(self._halving.paused())
        counts += [f"{paused} paused"] * bool(paused)
        for status in (store.STOPPED, store.FAILED):
            number = sum(trial.status == status for trial in over)
            counts += [f"{number} {status}"] * bool(number)
        best = max(
            (trial for trial in over if trial.status == store.FINISHED and trial.history),
            key=_score,
            default=None,
        )
        if best:
            counts.append(f"best {_score(best):.2%} (trial {best.number})")
        return [*lines, f"  {', '.join(counts)}; {self._left()}"]

    def _row(self, number: int, row: Mapping[str, Any]) -> str:
        rungs, until = self._halving.rungs, self._until[number]
        promoted = ", promoted" if until > rungs[0] else ""
        text = f"  {_name(self._trials[number])}{promoted}: epoch {row['epoch']}/{until}"
        if until < rungs[-1]:
            text += f" of {rungs[-1]}"
        if row["epoch"]:
            text += f", {row[SCORE]:.2%}, {row['images_per_s']:,.0f} images/s"
        return text

    def _left(self) -> str:
        done = {number: row["epoch"] for number, row in self._running.items()}
        left = self._halving.epochs_left(done)
        if not self._num_epochs or self._first_epoch_at is None:
            return f"{left:,} epochs to run"
        spent_s = max(time.monotonic() - self._first_epoch_at, _SHORTEST_ESTIMATE_S)
        seconds = left * spent_s / self._num_epochs
        end = time.strftime("%H:%M", time.localtime(time.time() + seconds))
        about = "at most" if len(self._halving.rungs) == 1 else "about"
        return f"{left:,} epochs to run, {about} {duration(seconds)}, until {end}"


def _last_error(trial: Any) -> Exception | None:
    """The last error of a trial of Ray Tune.

    Its `get_pickled_error` reads the copy in the storage folder, which is written later.
    """
    with contextlib.suppress(OSError, TypeError, pickle.UnpicklingError, AttributeError):
        return pickle.loads(Path(trial.pickled_error_file).read_bytes())
    return None


def _cause(error: BaseException | None) -> BaseException | None:
    """What was raised in the process of a trial, which Ray wraps, or that the process died."""
    if isinstance(error, RayActorError):
        return error
    return getattr(error, "cause", None) or error


def _reason_of(error: BaseException | None) -> str:
    """Why the process of a trial ended, in one line."""
    if isinstance(error, RayActorError):
        return f"its process died: {first_line(error)}"
    return first_line(error) if error else "it ended for an unknown reason"


def _name(trial: Trial) -> str:
    text = f"trial {trial.number}"
    return f"{text} ({trial.arm}, seed {trial.options['schedule.seed']})" if trial.arm else text


def _score(trial: Trial) -> float:
    return float(trial.history[-1][SCORE])


def line_of(trial: Trial) -> str:
    """One line on how a trial ended, or that it is paused."""
    text = f"{_name(trial)} {trial.status if trial.is_over else 'paused'}"
    if trial.history:
        spent_s = sum(row["seconds"] for row in trial.history)
        epochs = "1 epoch" if len(trial.history) == 1 else f"{len(trial.history)} epochs"
        text += f": {_score(trial):.2%} after {epochs}, {duration(spent_s)}"
    return f"{text} ({trial.reason})" if trial.reason else text


class TensorBoard(Callback):
    """Writes the metrics of every epoch for TensorBoard, to one folder per trial."""

    def __init__(self, folder: str) -> None:
        """Writes nothing yet; `folder` is local, and gets one folder per trial."""
        self._folder = Path(folder)
        self._writers: dict[int, Any] = {}

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        from tensorboardX import SummaryWriter

        number = trial.config["number"]
        if number not in self._writers:
            self._writers[number] = SummaryWriter(str(self._folder / f"{number:05d}"))
        for name, value in store.measured(result).items():
            self._writers[number].add_scalar(name, value, result["epoch"])
        self._writers[number].flush()

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        if writer := self._writers.pop(trial.config["number"], None):
            writer.close()
