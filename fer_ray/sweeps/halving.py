"""Which trial trains next, and how far: asynchronous successive halving. It knows no Ray.

ASHA in the promotion variant, Algorithm 2 of Li et al. 2020 (arXiv:1810.05934): a trial trains
to a rung and pauses there; what is in the best third of its rung is promoted, trains on to the
next, and the highest rung goes first. Two things differ, because here it is known how many
trials there will be:

- While a rung still grows, no more than a third of its results are promoted (the delay of
  Li et al. 2022, arXiv:2201.06834). The paper promotes whatever is in the best third at that
  moment; where later trials are better, as an optimizer's are, that is most of them.
- Once a rung is complete, the whole of its best third is promoted, as in the paper.

Where that leaves nobody, of two trials for instance, the best one goes on to the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fer_ray.models.checkpoint import SCORE
from fer_ray.sweeps.store import FAILED, FINISHED, Trial

REDUCTION = 3
"""One in so many trials of a rung is promoted."""
_RUNGS = 3


def rungs(epochs: int) -> tuple[int, ...]:
    """The epochs after which trials pause: a ninth and a third of all, and all."""
    return tuple(sorted({max(round(epochs / REDUCTION**k), 1) for k in range(_RUNGS)}))


@dataclass(frozen=True, kw_only=True)
class Job:
    """A part of a trial's training."""

    number: int
    """Of the trial."""
    until: int
    """The epoch after which it pauses, or is over."""


class Halving:
    """The trials of one search; a grid is one with a single rung, in which nothing is compared.

    Everything follows from the trials' records, so that what goes on after an interruption is
    decided as it would have been. A trial that failed, or finished early, counts in the rung that
    it was on its way to: as the worst, or by its last score.
    """

    def __init__(self, rungs: Sequence[int], num_trials: int, earlier: Iterable[Trial]) -> None:
        """Begins with the records.

        Args:
            rungs: epochs, ascending; the last one ends a trial.
            num_trials: those of all sittings.
            earlier: the trials that are written down.
        """
        self.rungs, self.num_trials = tuple(rungs), num_trials
        self.trials: dict[int, Trial] = {}
        """All that are known, as their records were when their last jobs ended."""
        self._entered: dict[int, int] = {}  # rungs that a trial reached or is on its way to
        self._results: list[dict[int, float]] = [{} for _ in self.rungs]  # scores by number
        self._training: set[int] = set()
        for trial in earlier:
            self.ended(trial)

    def next(self) -> Job | None:
        """What to train now; None: nothing, or nothing before one that trains has ended."""
        found = self._choose()
        if found is None:
            return None
        number, rung = found
        self._entered[number] = rung + 1
        self._training.add(number)
        return Job(number=number, until=self.rungs[rung])

    def begins(self, trial: Trial) -> None:
        """Takes in a new trial, whose number `next` gave."""
        self.trials[trial.number] = trial

    def ended(self, trial: Trial) -> None:
        """Takes in where a job left its trial: over, paused, or broken off between two rungs."""
        self._training.discard(trial.number)
        self.trials[trial.number] = trial
        epochs = len(trial.history)
        reached = sum(epochs >= rung for rung in self.rungs)
        # what an earlier sitting stopped was not on its way
        ended_early = trial.status in (FAILED, FINISHED)
        is_between = not trial.is_over and epochs not in (0, *self.rungs)
        self._entered[trial.number] = min(reached + (ended_early or is_between), len(self.rungs))
        for path in range(reached):
            self._results[path][trial.number] = trial.history[self.rungs[path] - 1][SCORE]
        if ended_early and reached < len(self.rungs):
            finished = trial.status == FINISHED and epochs > 0
            score = trial.history[-1][SCORE] if finished else -math.inf
            self._results[reached][trial.number] = score

    @property
    def is_training(self) -> bool:
        """Whether a job has not ended."""
        return bool(self._training)

    @property
    def is_over(self) -> bool:
        """Whether nothing trains and nothing will, unless `num_trials` grows."""
        return not self._training and self._choose() is None

    def paused(self) -> list[int]:
        """The trials that have a result and wait for a promotion, or for none any more."""
        return [number for number in self._idle() if self._entered[number]]

    def left_behind(self) -> dict[int, str]:
        """Once it is over: the trials that were not promoted, and why."""
        return {
            number: f"ASHA: not in the best third after epoch {len(self.trials[number].history)}"
            for number in self.paused()
        }

    def epochs_left(self, done: Mapping[int, int]) -> int:
        """About how many epochs there are to run: a third of each rung's trials are promoted,
        or as many as were already.

        Args:
            done: epochs of trials that train, by number; of others they are known.
        """
        if self.is_over:
            return 0
        left, before, expected = 0, 0, self.num_trials
        for path, rung in enumerate(self.rungs):
            entered = sum(count > path for count in self._entered.values())
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
        """By number, the trials that are neither over nor training."""
        return sorted(
            number
            for number, trial in self.trials.items()
            if not trial.is_over and number not in self._training
        )

    def _choose(self) -> tuple[int, int] | None:
        """The number of the next trial, and the place of the rung to train it to."""
        return self._broken_off() or self._promoted() or self._new() or self._last_chance()

    def _broken_off(self) -> tuple[int, int] | None:
        """What an interruption left between two rungs, or at the end but not written down."""
        for number in self._idle():
            path = self._entered[number] - 1
            if path == len(self.rungs) - 1 or (path >= 0 and number not in self._results[path]):
                return number, path
        return None

    def _promoted(self) -> tuple[int, int] | None:
        """The best trial that may be promoted, from the highest rung that has one."""
        found = None
        waiting = any(not self._entered[number] for number in self._idle())
        complete = len(self._entered) >= self.num_trials and not waiting
        for path, results in enumerate(self._results[:-1]):
            on_their_way = any(
                count == path + 1 and number not in results
                for number, count in self._entered.items()
            )
            complete = complete and not on_their_way
            best = self._promotable(path, complete)
            if best is not None:
                found, complete = (best, path + 1), False  # the next rung will grow
        return found

    def _promotable(self, path: int, complete: bool) -> int | None:
        """The best trial of a rung that may be promoted; of equally good ones the first."""
        results = self._results[path]
        num_places = len(results) // REDUCTION
        num_promoted = sum(count > path + 1 for count in self._entered.values())
        if num_promoted >= num_places and not complete:
            return None
        ranked = sorted(results, key=lambda number: (-results[number], number))[:num_places]
        return next((number for number in ranked if self._is_paused_at(number, path)), None)

    def _is_paused_at(self, number: int, path: int) -> bool:
        is_idle = not self.trials[number].is_over and number not in self._training
        return is_idle and self._entered[number] == path + 1

    def _new(self) -> tuple[int, int] | None:
        """A trial that has not begun."""
        for number in self._idle():
            if not self._entered[number]:
                return number, 0
        unknown = (number for number in range(self.num_trials) if number not in self._entered)
        return next(((number, 0) for number in unknown), None)

    def _last_chance(self) -> tuple[int, int] | None:
        """The best of those that came furthest, where no trial has come to its end."""
        finished = any(trial.status == FINISHED for trial in self.trials.values())
        paused = self.paused()
        if self._training or finished or not paused:
            return None
        path = max(self._entered[number] for number in paused) - 1
        furthest = [number for number in paused if self._entered[number] == path + 1]
        best = max(furthest, key=lambda number: (self._results[path][number], -number))
        return best, path + 1
