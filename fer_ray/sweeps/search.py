"""The options that a search tries, drawn by Optuna's TPE, and the jobs for Ray Tune."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from ray.tune.search import Searcher

from fer_ray.models.checkpoint import SCORE
from fer_ray.sweeps import store
from fer_ray.sweeps.halving import Halving, Job
from fer_ray.sweeps.importance import distribution
from fer_ray.sweeps.losses import Losses
from fer_ray.sweeps.space import Choices, Range
from fer_ray.sweeps.store import SweepFolder, Trial

_STARTUP_TRIALS = 10
"""Trials that are drawn at random before TPE takes over: Optuna's default."""


class Suggestions:
    """Optuna's TPE on a space: draws the options of a new trial, given all other trials."""

    def __init__(self, ranges: dict[str, Range | Choices], *, seed: int) -> None:
        self._seed = seed
        self._distributions = {
            name: distribution(name, asdict(values) if isinstance(values, Range) else values)
            for name, values in ranges.items()
        }

    def ask(self, number: int, trials: Iterable[Trial]) -> dict[str, Any]:
        """The options of a new trial, by dotted name.

        They depend on the seed, the number and the other trials alone, so a resumed search draws
        the same ones.

        Args:
            number: of the new trial.
            trials: the others, over or not.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        state = np.random.SeedSequence((self._seed, number)).generate_state(1)
        # trials run concurrently: those without a result count as bad, so they are not repeated
        sampler = optuna.samplers.TPESampler(
            seed=int(state[0]), n_startup_trials=_STARTUP_TRIALS, constant_liar=True
        )
        study = optuna.create_study(direction="maximize", sampler=sampler)
        ordered = sorted(trials, key=lambda trial: trial.number)
        study.add_trials([self._optuna_trial(trial) for trial in ordered])
        return dict(study.ask(self._distributions).params)

    def _optuna_trial(self, trial: Trial) -> Any:
        """A trial in Optuna's form.

        TPE treats trials that did not finish, paused ones too, as pruned: they rank below the
        finished ones, by the epoch that they reached and then by their score.
        """
        from optuna.trial import TrialState, create_trial

        scores = {row["epoch"]: row[SCORE] for row in trial.history}
        if trial.status == store.FAILED:
            state = TrialState.FAIL
        elif not scores:
            state = TrialState.RUNNING
        elif trial.status == store.FINISHED:
            state = TrialState.COMPLETE
        else:
            state = TrialState.PRUNED
        return create_trial(
            state=state,
            value=trial.history[-1][SCORE] if state == TrialState.COMPLETE else None,
            params={name: trial.options[name] for name in self._distributions},
            distributions=self._distributions,
            intermediate_values=scores,
        )


class Planner(Searcher):
    """Hands the jobs of `Halving` to Ray Tune, for which each job is a trial."""

    def __init__(
        self,
        files: SweepFolder,
        halving: Halving,
        losses: Losses,
        create: Callable[[int], Trial],
    ) -> None:
        """Starts with what is left to do.

        Args:
            files: of the sweep.
            halving: decides on the jobs.
            losses: decides on the nodes that they avoid.
            create: creates and records a new trial with a number.
        """
        super().__init__(metric=SCORE, mode="max")
        self._files, self._halving, self._losses, self._create = files, halving, losses, create
        self._jobs: dict[str, Job] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """The next job; None where there is none now; `FINISHED` where there will be none."""
        if self._losses.leave_no_node:
            return Searcher.FINISHED
        job = self._halving.next()
        if job is None:
            return None if self._halving.is_training else Searcher.FINISHED
        if job.number not in self._halving.trials:
            self._halving.begins(self._create(job.number))
        self._jobs[trial_id] = job
        avoid = sorted(self._losses.avoided_by(job.number))
        return {"number": job.number, "until": job.until, "avoid": avoid}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Reports to `Halving` how the job ended, from the trial's files.

        After a loss, `Progress.on_trial_error` does that, which Ray Tune calls next with the error.
        """
        number = self._jobs.pop(trial_id).number
        if not error:
            self._halving.ended(self._files.trial(number).read())

    def save(self, checkpoint_path: str) -> None:
        """Writes an empty file: the next session starts from the sweep's files."""
        Path(checkpoint_path).write_bytes(b"")

    def restore(self, checkpoint_path: str) -> None:
        """Does nothing, as `save` explains."""
