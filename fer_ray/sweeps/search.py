"""Which trial comes next, and which is not worth going on: Optuna's TPE, and ASHA.

Both are filled from the records of earlier sittings, so that a search that was interrupted goes
on with all that it knew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import Searcher

from fer_ray.checkpoint import SCORE
from fer_ray.sweeps import records
from fer_ray.sweeps.importance import distribution
from fer_ray.sweeps.records import Trial
from fer_ray.sweeps.space import Choices, Range

REDUCTION = 3
"""ASHA lets about one in so many trials pass each rung."""
_RUNGS = 3
_NO_CONTROLLER: Any = None
"""ASHA does not look at it."""
_STARTUP_TRIALS = 10
"""Optuna draws so many at random before TPE takes over: its own default."""


def first_rung(epochs: int) -> int:
    """Epochs before ASHA first looks: two more rungs fit in, each `REDUCTION` times as long."""
    return max(round(epochs / REDUCTION ** (_RUNGS - 1)), 1)


class Suggestions:
    """Optuna's study of one search: asks for new options, is told how each trial ended."""

    def __init__(self, ranges: dict[str, Range | Choices], *, seed: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        # trials run side by side: those under way count as bad, so that they are not repeated
        sampler = optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=_STARTUP_TRIALS, constant_liar=True
        )
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._distributions = {
            name: distribution(name, asdict(given) if isinstance(given, Range) else given)
            for name, given in ranges.items()
        }
        self._asked: dict[int, Any] = {}

    def remember(self, trial: Trial) -> None:
        """Takes in a trial of an earlier sitting, over or not."""
        params = {name: trial.options[name] for name in self._distributions}
        self._study.enqueue_trial(params)
        self._asked[trial.number] = self._study.ask(self._distributions)
        if trial.is_over:
            self.tell(trial)

    def ask(self, number: int) -> dict[str, Any]:
        """Options for a new trial, by dotted name."""
        self._asked[number] = self._study.ask(self._distributions)
        return dict(self._asked[number].params)

    def tell(self, trial: Trial) -> None:
        """Takes in how a trial ended; stopped ones rank by how far they came."""
        from optuna.trial import TrialState

        asked = self._asked.pop(trial.number, None)
        if asked is None:
            return
        for row in trial.history:
            asked.report(row[SCORE], row["epoch"])
        if trial.status == records.FINISHED and trial.history:
            self._study.tell(asked, trial.history[-1][SCORE])
        elif trial.status == records.STOPPED:
            self._study.tell(asked, state=TrialState.PRUNED)
        else:
            self._study.tell(asked, state=TrialState.FAIL)


class Planner(Searcher):
    """Hands the numbers of trials to Ray Tune: those that wait, then new ones of a search."""

    def __init__(
        self,
        sweep: str,
        waiting: Sequence[int],
        *,
        num_new: int = 0,
        suggest: Callable[[], Trial] | None = None,
        ended: Callable[[Trial], None] | None = None,
    ) -> None:
        """Starts with what is left to do.

        Args:
            sweep: the sweep's folder.
            waiting: numbers of the trials that are written down but not over.
            num_new: how many more there will be.
            suggest: makes and writes down a new trial.
            ended: is told every trial that is over.
        """
        super().__init__(metric=SCORE, mode="max")
        self._sweep, self._waiting, self._num_new = sweep, list(waiting), num_new
        self._suggest, self._ended = suggest, ended
        self._numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str:  # type: ignore[override]
        """The next trial's number, or that there is none."""
        if self._waiting:
            number = self._waiting.pop(0)
        elif self._num_new and self._suggest:
            self._num_new -= 1
            number = self._suggest().number
        else:
            return Searcher.FINISHED
        self._numbers[trial_id] = number
        return {"number": number}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Passes on how it ended, from its records."""
        trial = records.read_trial(self._sweep, self._numbers[trial_id])
        if self._ended and trial.is_over:
            self._ended(trial)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the records are what a further sitting begins with."""
        Path(checkpoint_path).write_bytes(b"")

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as in `save`."""


class Halving(ASHAScheduler):
    """ASHA (Li et al. 2020, arXiv:1810.05934) that knows trials by number and records its stops.

    The number stays when a later sitting goes on with a trial, so that each counts once on every
    rung. What reaches the last epoch is let go on to its own end.
    """

    def __init__(self, sweep: str, epochs: int, earlier: Sequence[Trial]) -> None:
        super().__init__(
            time_attr="epoch",
            metric=SCORE,
            mode="max",
            max_t=epochs,
            grace_period=min(first_rung(epochs), epochs),
            reduction_factor=REDUCTION,
            # so that it never stops what has reached the last rung already
            stop_last_trials=False,
        )
        self._sweep, self._epochs = sweep, epochs
        for trial in earlier:
            stub = _stub(trial.number)
            super().on_trial_add(_NO_CONTROLLER, stub)
            for row in trial.history:
                super().on_trial_result(_NO_CONTROLLER, stub, row)

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """They are set already."""
        return True

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """A trial begins, or goes on."""
        super().on_trial_add(tune_controller, _stub(trial.config["number"]))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decides after an epoch, and writes a stop down."""
        number, epoch = trial.config["number"], result["epoch"]
        if epoch >= self._epochs:
            return self.CONTINUE
        decision = super().on_trial_result(tune_controller, _stub(number), result)
        if decision == self.STOP:
            reason = f"ASHA: below the best third after epoch {epoch}"
            records.end(self._sweep, number, records.STOPPED, reason)
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Nothing more: its last result has been seen."""

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Nothing: what it reported stays."""

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Nothing: what it reported stays."""


def _stub(number: int) -> Any:
    """What ASHA looks at of a trial."""
    return SimpleNamespace(trial_id=f"{number:05d}")
