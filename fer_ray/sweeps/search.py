"""What a search tries: Optuna's TPE draws options, and `Planner` hands jobs to Ray Tune."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from ray.tune.search import Searcher

from fer_ray.models.checkpoint import SCORE
from fer_ray.sweeps import store
from fer_ray.sweeps.halving import Halving, Job
from fer_ray.sweeps.importance import distribution
from fer_ray.sweeps.space import Choices, Range
from fer_ray.sweeps.store import Trial

_STARTUP_TRIALS = 10
"""Optuna draws so many at random before TPE takes over: its own default."""


class Suggestions:
    """Optuna's TPE on a space: options for a new trial from all that is known of the others."""

    def __init__(self, ranges: dict[str, Range | Choices], *, seed: int) -> None:
        self._seed = seed
        self._distributions = {
            name: distribution(name, asdict(given) if isinstance(given, Range) else given)
            for name, given in ranges.items()
        }

    def ask(self, number: int, known: Iterable[Trial]) -> dict[str, Any]:
        """Options for a new trial, by dotted name.

        They follow from the seed, the number and what is known, whoever asked before.

        Args:
            number: of the new trial.
            known: the others, over or not.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        state = np.random.SeedSequence((self._seed, number)).generate_state(1)
        # trials run side by side: those without a result count as bad, so as not to be repeated
        sampler = optuna.samplers.TPESampler(
            seed=int(state[0]), n_startup_trials=_STARTUP_TRIALS, constant_liar=True
        )
        study = optuna.create_study(direction="maximize", sampler=sampler)
        study.add_trials([self._told(trial) for trial in sorted(known, key=lambda one: one.number)])
        return dict(study.ask(self._distributions).params)

    def _told(self, trial: Trial) -> Any:
        """A trial as Optuna takes it.

        Those that did not come to the end, paused ones too, rank behind those that did, by how
        far they came and then by their score: to TPE they are pruned.
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
    """Hands what `Halving` decides to Ray Tune: to it, each job is a trial of its own."""

    def __init__(self, sweep: str, halving: Halving, make: Callable[[int], Trial]) -> None:
        """Starts with what is left to do.

        Args:
            sweep: the sweep's folder.
            halving: decides.
            make: makes and writes down a new trial of that number.
        """
        super().__init__(metric=SCORE, mode="max")
        self._sweep, self._halving, self._make = sweep, halving, make
        self._jobs: dict[str, Job] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """The next job; None for none now; or that there is none any more."""
        job = self._halving.next()
        if job is None:
            return None if self._halving.is_training else Searcher.FINISHED
        if job.number not in self._halving.trials:
            self._halving.begins(self._make(job.number))
        self._jobs[trial_id] = job
        return {"number": job.number, "until": job.until}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Passes on how the job ended, from the trial's records."""
        trial = store.read_trial(self._sweep, self._jobs.pop(trial_id).number)
        # a process that died too often: that is written down only after this call
        self._halving.ended(replace(trial, status=store.FAILED) if error else trial)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the records are what a further sitting begins with."""
        Path(checkpoint_path).write_bytes(b"")

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as in `save`."""
