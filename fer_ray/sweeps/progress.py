"""How a sweep stands, while it runs: a live table, lines that stay, TensorBoard's files."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ray.tune import Callback

from fer_ray.config.schema import TrainConfig
from fer_ray.sweeps import store
from fer_ray.sweeps.halving import Halving
from fer_ray.sweeps.store import Trial
from fer_ray.sweeps.trial import free_workers

_ON_A_TERMINAL_EVERY_S = 2.0
_IN_A_LOG_EVERY_S = 30.0
_TABLES_EVERY_S = 60.0
_FREE_FOR_S = 20.0
_SHORTEST_ESTIMATE_S = 5.0
"""Before, epochs a second would say little."""


def duration(seconds: float) -> str:
    """Seconds for people: ``48 s``, ``12 min``, ``3 h 20 min``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


class Progress(Callback):
    """Follows the trials of one sitting; every number comes from their records or reports."""

    def __init__(
        self,
        sweep: str,
        base: TrainConfig,
        halving: Halving,
        *,
        log: Callable[[str], None],
    ) -> None:
        """Begins where the records of earlier sittings end.

        Args:
            sweep: the sweep's folder.
            base: its base settings.
            halving: knows all trials that are written down, and what there is to do.
            log: receives lines that stay.
        """
        self._sweep, self._base, self._log = sweep, base, log
        self._halving = halving
        self._trials = dict(halving.trials)
        self._running: dict[int, dict[str, Any]] = {}
        self._until: dict[int, int] = {}
        self._live = sys.stdout.isatty()
        self._drawn = 0
        self._start = self._said = self._wrote = time.monotonic()
        self._first_epoch_at: float | None = None
        self._epochs_here = 0
        self._interrupted = False
        self._to_free: dict[int, float] = {}
        self._freed = 0.0

    def interrupt(self) -> None:
        """Ends the sitting with the next step of Ray Tune."""
        self._interrupted = True

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        number = trial.config["number"]
        self._trials[number] = store.read_trial(self._sweep, number)
        history = self._trials[number].history
        self._running[number] = dict(history[-1]) if history else {"epoch": 0}
        self._until[number] = trial.config["until"]

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self._running[trial.config["number"]] = result
        self._first_epoch_at = self._first_epoch_at or time.monotonic() - result["seconds"]
        self._epochs_here += 1

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._ended(trial.config["number"])

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Its process died too often: nothing in it could write that down."""
        number = trial.config["number"]
        lines = [line.strip() for line in str(trial.get_error() or "").splitlines()]
        reason = next((line for line in reversed(lines) if line), "no reason given")
        store.end(self._sweep, number, store.FAILED, f"its process died: {reason}")
        self._ended(number)

    def on_step_end(self, iteration: int, trials: Any, **info: Any) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        now = time.monotonic()
        if self._to_free and now - self._freed >= 1:
            self._freed = now
            self._free_workers(now)
        every = _ON_A_TERMINAL_EVERY_S if self._live else _IN_A_LOG_EVERY_S
        if now - self._said >= every:
            self._said = now
            self._draw()
        if now - self._wrote >= _TABLES_EVERY_S:
            store.write_trials(self._sweep, self._base)
            self._wrote = time.monotonic()

    def _ended(self, number: int) -> None:
        self._running.pop(number, None)
        trial = self._trials[number] = store.read_trial(self._sweep, number)
        until = self._until.pop(number, self._halving.rungs[-1])
        came_to_it = trial.is_over or len(trial.history) >= until
        was_killed = trial.status == store.FAILED or not came_to_it
        # never what may be promoted: it would lose its new workers
        if was_killed and self._base.scaling.num_workers > 1:
            self._to_free[number] = time.monotonic() + _FREE_FOR_S
        if not came_to_it:  # the time budget is used up
            return
        self._erase()
        self._log(line_of(trial))
        self._draw()

    def _free_workers(self, now: float) -> None:
        """For some seconds, since a trial that is being killed may still replace its workers."""
        for number, until in list(self._to_free.items()):
            free_workers(self._sweep, number)
            if now > until:
                del self._to_free[number]

    def close(self) -> None:
        """Removes the table from a terminal."""
        self._erase()

    def _draw(self) -> None:
        self._erase()
        lines = self.table()
        if self._live:
            # a line that wraps would count as two when it is erased
            width = shutil.get_terminal_size().columns - 1
            print("\n".join(line[:width] for line in lines), flush=True)
            self._drawn = len(lines)
        else:
            for line in lines:
                self._log(line)

    def _erase(self) -> None:
        if self._drawn:
            print(f"\x1b[{self._drawn}F\x1b[J", end="", flush=True)
            self._drawn = 0

    def table(self) -> list[str]:
        """The running trials, one a line, then how many are over and when the sweep will end."""
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
            text += f", {row['validation_accuracy']:.2%}, {row['images_per_s']:,.0f} images/s"
        return text

    def _left(self) -> str:
        left = self._halving.epochs_left({one: row["epoch"] for one, row in self._running.items()})
        if not self._epochs_here or self._first_epoch_at is None:
            return f"{left:,} epochs to run"
        spent_s = max(time.monotonic() - self._first_epoch_at, _SHORTEST_ESTIMATE_S)
        seconds = left * spent_s / self._epochs_here
        at = time.strftime("%H:%M", time.localtime(time.time() + seconds))
        about = "at most" if len(self._halving.rungs) == 1 else "about"
        return f"{left:,} epochs to run, {about} {duration(seconds)}, until {at}"


def _name(trial: Trial) -> str:
    text = f"trial {trial.number}"
    return f"{text} ({trial.arm}, seed {trial.options['schedule.seed']})" if trial.arm else text


def _score(trial: Trial) -> float:
    return float(trial.history[-1]["validation_accuracy"])


def line_of(trial: Trial) -> str:
    """How a trial ended, or that it pauses, in one line."""
    text = f"{_name(trial)} {trial.status if trial.is_over else 'paused'}"
    if trial.history:
        spent_s = sum(row["seconds"] for row in trial.history)
        epochs = "1 epoch" if len(trial.history) == 1 else f"{len(trial.history)} epochs"
        text += f": {_score(trial):.2%} after {epochs}, {duration(spent_s)}"
    return f"{text} ({trial.reason})" if trial.reason else text


class TensorBoard(Callback):
    """Writes every epoch's numbers for TensorBoard, a folder a trial."""

    def __init__(self, folder: str) -> None:
        """Begins without a file; `folder` is local, and has a folder a trial below it."""
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
