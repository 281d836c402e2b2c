"""Asynchronous successive halving: which trial trains next, and how far. It does not use Ray.

ASHA in the promotion variant, Algorithm 2 of Li et al. 2020 (arXiv:1810.05934): a trial trains to
a rung and pauses there. Trials in the best third of their rung are promoted, which means that they
train to the next rung; the highest rung has priority. Since the number of trials is known here,
the promotions differ in two ways:

- While a rung still grows, at most a third of its results are promoted (the delay of Li et al.
  2022, arXiv:2201.06834). The paper promotes every trial that is in the best third at that moment;
  with an optimizer, whose later trials are better, that would be most trials.
- Once a rung is complete, its whole best third is promoted, as in the paper.

Where no trial would be promoted, for instance of two trials, the best one trains to the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fer_ray.models.checkpoint import SCORE
from fer_ray.sweeps.store import FAILED, FINISHED, Trial

REDUCTION = 3
"""One of this many trials of a rung is promoted."""
_RUNGS = 3


def rungs(epochs: int) -> tuple[int, ...]:
    """The epochs after which trials pause: a ninth and a third of all epochs, and the last."""
    return tuple(sorted({max(round(epochs / REDUCTION**k), 1) for k in range(_RUNGS)}))


@dataclass(frozen=True, kw_only=True)
class Job:
    """The training of a trial up to a rung."""

    number: int
    """Of the trial."""
    until: int
    """The epoch after which it pauses, or is over."""


class Halving:
    """The state of a search. A grid has a single rung, at which nothing is compared.

    All decisions follow from the trials' files, so a resumed sweep decides as it would have done
    without the interruption. A trial that failed, or finished early, counts in the rung that it
    was training to: as the worst, or by its last score.
    """

    def __init__(self, rungs: Sequence[int], num_trials: int, earlier: Iterable[Trial]) -> None:
        """Starts from the trials that exist.

        Args:
            rungs: epochs, ascending; the last one ends a trial.
            num_trials: of the whole sweep, earlier sessions included.
            earlier: the trials that were created before.
        """
        self.rungs, self.num_trials = tuple(rungs), num_trials
        self.trials: dict[int, Trial] = {}
        """All created trials, as they were when their last jobs ended."""
        self._entered: dict[int, int] = {}  # rungs that a trial reached or trains to
        self._results: list[dict[int, float]] = [{} for _ in self.rungs]  # scores by number
        self._training: set[int] = set()
        for trial in earlier:
            self.ended(trial)

    def next(self) -> Job | None:
        """The next job; None where there is none, or none before a running job has ended."""
        choice = self._choose()
        if choice is None:
            return None
        number, rung = choice
        self._entered[number] = rung + 1
        self._training.add(number)
        return Job(number=number, until=self.rungs[rung])

    def begins(self, trial: Trial) -> None:
        """Adds a new trial, with the number that `next` returned."""
        self.trials[trial.number] = trial

    def ended(self, trial: Trial) -> None:
        """Records how a job left its trial: over, paused, or interrupted between two rungs."""
        self._training.discard(trial.number)
        self.trials[trial.number] = trial
        epochs = len(trial.history)
        reached = sum(epochs >= rung for rung in self.rungs)
        # a trial that an earlier session stopped was not training to a rung
        ended_early = trial.status in (FAILED, FINISHED)
        is_between = not trial.is_over and epochs not in (0, *self.rungs)
        self._entered[trial.number] = min(reached + (ended_early or is_between), len(self.rungs))
        for index in range(reached):
            self._results[index][trial.number] = trial.history[self.rungs[index] - 1][SCORE]
        if ended_early and reached < len(self.rungs):
            finished = trial.status == FINISHED and epochs > 0
            score = trial.history[-1][SCORE] if finished else -math.inf
            self._results[reached][trial.number] = score

    @property
    def is_training(self) -> bool:
        """Whether a job is running."""
        return bool(self._training)

    @property
    def is_over(self) -> bool:
        """Whether nothing trains and nothing will train, unless `num_trials` grows."""
        return not self._training and self._choose() is None

    def paused(self) -> list[int]:
        """The trials that have a result and are not over: they wait for a promotion."""
        return [number for number in self._idle() if self._entered[number]]

    def left_behind(self) -> dict[int, str]:
        """Once the sweep is over: the trials that were not promoted, and the reason."""
        return {
            number: f"ASHA: not in the best third after epoch {len(self.trials[number].history)}"
            for number in self.paused()
        }

    def epochs_left(self, done: Mapping[int, int]) -> int:
        """Estimates how many epochs there are to run.

        It assumes that a third of each rung's trials are promoted, or as many as already were.

        Args:
            done: epochs of the trials that are training now, by number.
        """
        if self.is_over:
            return 0
        left, before, expected = 0, 0, self.num_trials
        for index, rung in enumerate(self.rungs):
            entered = sum(count > index for count in self._entered.values())
            expected = max(expected, entered)
            left += (expected - entered) * (rung - before)
            before, expected = rung, max(expected // REDUCTION, 1)
        for number in {*self._training, *self._idle()}:
            epochs = len(self.trials[number].history) if number in self.trials else 0
            if self._entered[number]:
                target = self.rungs[self._entered[number] - 1]
                left += max(target - max(done.get(number, 0), epochs), 0)
        return left

    def _idle(self) -> list[int]:
        """The numbers of the trials that are neither over nor training, ascending."""
        return sorted(
            number
            for number, trial in self.trials.items()
            if not trial.is_over and number not in self._training
        )

    def _choose(self) -> tuple[int, int] | None:
        """The number of the next trial, and the index of the rung to train it to."""
        return self._interrupted() or self._promoted() or self._new() or self._last_chance()

    def _interrupted(self) -> tuple[int, int] | None:
        """A trial that was interrupted between two rungs, or before its end was recorded."""
        for number in self._idle():
            rung = self._entered[number] - 1
            if rung == len(self.rungs) - 1 or (rung >= 0 and number not in self._results[rung]):
                return number, rung
        return None

    def _promoted(self) -> tuple[int, int] | None:
        """The best trial that may be promoted, from the highest rung that has one."""
        choice = None
        waiting = any(not self._entered[number] for number in self._idle())
        complete = len(self._entered) >= self.num_trials and not waiting
        for rung, results in enumerate(self._results[:-1]):
            still_training = any(
                count == rung + 1 and number not in results
                for number, count in self._entered.items()
            )
            complete = complete and not still_training
            best = self._promotable(rung, complete)
            if best is not None:
                choice, complete = (best, rung + 1), False  # the next rung will grow
        return choice

    def _promotable(self, rung: int, complete: bool) -> int | None:
        """The best trial of a rung that may be promoted; of equally good ones the first."""
        results = self._results[rung]
        num_places = len(results) // REDUCTION
        num_promoted = sum(count > rung + 1 for count in self._entered.values())
        if num_promoted >= num_places and not complete:
            return None
        ranked = sorted(results, key=lambda number: (-results[number], number))[:num_places]
        return next((number for number in ranked if self._is_paused_at(number, rung)), None)

    def _is_paused_at(self, number: int, rung: int) -> bool:
        is_idle = not self.trials[number].is_over and number not in self._training
        return is_idle and self._entered[number] == rung + 1

    def _new(self) -> tuple[int, int] | None:
        """A trial that has not begun."""
        for number in self._idle():
            if not self._entered[number]:
                return number, 0
        new_numbers = (number for number in range(self.num_trials) if number not in self._entered)
        return next(((number, 0) for number in new_numbers), None)

    def _last_chance(self) -> tuple[int, int] | None:
        """The best of the trials at the highest rung, where no trial has finished."""
        finished = any(trial.status == FINISHED for trial in self.trials.values())
        paused = self.paused()
        if self._training or finished or not paused:
            return None
        rung = max(self._entered[number] for number in paused) - 1
        highest = [number for number in paused if self._entered[number] == rung + 1]
        best = max(highest, key=lambda number: (self._results[rung][number], -number))
        return best, rung + 1
