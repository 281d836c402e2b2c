"""Which trials ASHA promotes, on drawn scores: no trial is trained."""

from __future__ import annotations

import random
from copy import deepcopy
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fer_ray.sweeps.halving import Halving, Job, rungs
from fer_ray.sweeps.store import FAILED, FINISHED, STOPPED, UNFINISHED, Trial

RUNGS = (1, 3, 9)


def trial(number: int, *scores: float, status: str = UNFINISHED) -> Trial:
    history = [{"epoch": e, "validation_accuracy": score} for e, score in enumerate(scores, 1)]
    return Trial(number=number, arm=None, options={}, history=history, status=status)


@dataclass
class Search:
    """Trains by a `Halving` as Ray Tune would, in a random order, and may be interrupted."""

    num_trials: int
    scores: list[float]
    """Of a trial after any of its epochs, by number."""
    failing: dict[int, int] = field(default_factory=dict)
    """By number, the epochs after which a trial fails."""
    finishing: dict[int, int] = field(default_factory=dict)
    """By number, the epochs after which early stopping ends a trial."""
    num_workers: int = 2
    seed: int = 0
    interrupt_every: int = 0
    """Jobs after which what trains is broken off; 0: never."""
    trials: dict[int, Trial] = field(default_factory=dict)
    jobs: list[Job] = field(default_factory=list)

    def run(self) -> Halving:
        halving, training = self.halving(), []
        chance = random.Random(self.seed)
        while not halving.is_over:
            while len(training) < self.num_workers and (job := halving.next()):
                if job.number not in halving.trials:
                    self.trials[job.number] = trial(job.number)
                    halving.begins(self.trials[job.number])
                self.jobs.append(job)
                training.append(job)
            assert training and halving.is_training, "it would wait for ever"
            ended = training.pop(chance.randrange(len(training)))
            self.train(ended.number, ended.until)
            halving.ended(self.trials[ended.number])
            if self.interrupt_every and len(self.jobs) % self.interrupt_every == 0:
                for job in training:
                    self.train(job.number, chance.randint(0, job.until))
                halving, training = self.halving(), []
        return halving

    def halving(self) -> Halving:
        return Halving(RUNGS, self.num_trials, self.trials.values())

    def train(self, number: int, until: int) -> None:
        """Up to an epoch; never backwards."""
        epochs, status = max(until, len(self.trials[number].history)), UNFINISHED
        for ends, why in ((self.failing, FAILED), (self.finishing, FINISHED)):
            if epochs >= ends.get(number, 99):  # at a rung it does not pause
                epochs, status = ends[number], why
        status = FINISHED if epochs == RUNGS[-1] else status
        if self.trials[number].is_over:
            return
        scores = [self.scores[number]] * epochs
        self.trials[number] = trial(number, *scores, status=status)

    def reached(self, path: int) -> set[int]:
        return {n for n, one in self.trials.items() if len(one.history) >= RUNGS[path]}


@st.composite
def searches(draw, failures: bool = True, interrupts: bool = True) -> Search:
    count = draw(st.integers(1, 40))
    ends = st.dictionaries(st.integers(0, count - 1), st.integers(0, 8), max_size=count)
    failing = draw(ends) if failures else {}
    finishing = draw(ends) if failures else {}
    return Search(
        num_trials=count,
        # few values, so that there are ties
        scores=draw(st.lists(st.integers(0, 9).map(float), min_size=count, max_size=count)),
        failing=failing,
        finishing={n: max(e, 1) for n, e in finishing.items() if n not in failing},
        num_workers=draw(st.integers(1, 5)),
        seed=draw(st.integers(0, 99)),
        interrupt_every=draw(st.integers(0, 6)) if interrupts else 0,
    )


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [(1, (1,)), (2, (1, 2)), (4, (1, 4)), (9, (1, 3, 9)), (30, (3, 10, 30)), (36, (4, 12, 36))],
)
def test_rungs_are_a_ninth_a_third_and_all(epochs, expected):
    assert rungs(epochs) == expected


def test_the_first_promotion_waits_for_three_results():
    halving = Halving(RUNGS, 9, [])
    for number, score in enumerate((0.5, 0.6)):
        assert halving.next() == Job(number=number, until=1)
        halving.ended(trial(number, score))
    assert halving.next() == Job(number=2, until=1)
    assert halving.next() == Job(number=3, until=1), "nothing to be promoted yet"
    halving.ended(trial(2, 0.4))
    assert halving.next() == Job(number=1, until=3)
    assert halving.next() == Job(number=4, until=1)


def test_while_a_rung_grows_no_more_than_a_third_are_promoted_and_then_the_best_third():
    """Each trial is better than all before it: the paper's rule would promote nearly all."""
    search = Search(9, [float(number) for number in range(9)], num_workers=1)
    halving = search.run()
    assert [job for job in search.jobs if job.until == 3][:2] == [
        Job(number=2, until=3),
        Job(number=5, until=3),
    ]
    assert search.reached(1) == {2, 5, 6, 7, 8}, "6, 7 and 8 are the best third"
    assert search.trials[8].status == FINISHED
    assert halving.left_behind()[0] == "ASHA: not in the best third after epoch 1"
    assert halving.left_behind()[7] == "ASHA: not in the best third after epoch 3"


def test_a_high_rung_goes_first():
    earlier = [trial(n, *[0.5 + n / 100] * 3) for n in range(3)]
    earlier += [trial(n, 0.1 + n / 100) for n in range(3, 9)]
    halving = Halving(RUNGS, 20, earlier)
    assert halving.next() == Job(number=2, until=9)
    assert halving.next() == Job(number=9, until=1), "three of nine are promoted already"


def test_a_failed_trial_is_the_worst_of_its_rung():
    earlier = [trial(0, status=FAILED), trial(1, 0.2), trial(2, 0.1)]
    assert Halving(RUNGS, 9, earlier).next() == Job(number=1, until=3)
    # it was promoted before it failed, and its place is taken
    earlier = [trial(0, 0.9, 0.9, status=FAILED), trial(1, 0.2), trial(2, 0.1)]
    halving = Halving(RUNGS, 3, earlier)
    assert halving.next() == Job(number=1, until=3), "but one trial has to come to the end"


def test_what_was_broken_off_goes_on_before_anything_else():
    earlier = [trial(0, 0.9), trial(1, 0.1, 0.1), trial(2, *[0.5] * 9)]
    halving = Halving(RUNGS, 9, earlier)
    assert halving.next() == Job(number=1, until=3)
    assert halving.next() == Job(number=2, until=9), "its end was not written down"


def test_a_trial_whose_folder_was_lost_is_drawn_again():
    halving = Halving(RUNGS, 3, [trial(0, 0.1), trial(2, 0.1)])
    assert halving.next() == Job(number=1, until=1)
    assert halving.next() is None


def test_more_trials_compete_with_those_that_were_left_behind():
    search = Search(9, [float(n % 5) for n in range(18)], num_workers=1)
    for number in search.run().left_behind():
        search.trials[number] = trial(
            number, *[search.scores[number]] * len(search.trials[number].history), status=STOPPED
        )
    before = dict(search.trials)
    search.num_trials = 18
    assert not search.halving().is_over
    search.run()
    assert {n: search.trials[n] for n in before} == before
    assert len(search.trials) == 18
    best = [n for n in range(9, 18) if search.scores[n] == 4.0]
    assert set(best) & search.reached(1)


def test_a_grid_trains_each_trial_to_its_end_in_their_order():
    halving = Halving((9,), 3, [trial(0), trial(1, 0.1, 0.2), trial(2)])
    assert halving.epochs_left({}) == 25
    handed = [halving.next() for _ in range(4)]
    assert handed == [*(Job(number=n, until=9) for n in (1, 0, 2)), None]
    assert halving.epochs_left({1: 5}) == 22
    for number in (0, 2):
        halving.ended(trial(number, *[0.5] * 9, status=FINISHED))
    halving.ended(trial(1, status=FAILED))
    assert halving.is_over and not halving.left_behind() and halving.epochs_left({}) == 0


def test_the_epochs_to_run_are_those_of_a_third_of_each_rung():
    assert Halving(RUNGS, 27, []).epochs_left({}) == 27 + 9 * 2 + 3 * 6
    search = Search(27, [-float(number) for number in range(27)], num_workers=1)
    assert search.run().epochs_left({}) == 0
    assert sum(len(one.history) for one in search.trials.values()) == 63


@given(searches())
@settings(max_examples=300, deadline=None)
def test_every_trial_ends_once_and_one_comes_to_the_end(search):
    halving = search.run()
    behind = halving.left_behind()
    assert sorted(search.trials) == list(range(search.num_trials))
    for number, one in search.trials.items():
        assert one.is_over != (number in behind)
        assert one.is_over or len(one.history) in RUNGS[:-1]
    if any(one.status != FAILED for one in search.trials.values()):
        assert any(one.status == FINISHED for one in search.trials.values())
    assert halving.next() is None and halving.epochs_left({}) == 0


@given(searches(failures=False))
@settings(max_examples=200, deadline=None)
def test_the_best_third_of_each_rung_goes_on_and_few_others(search):
    search.run()
    for path in range(len(RUNGS) - 1):
        arrived, went_on = search.reached(path), search.reached(path + 1)
        places = len(arrived) // 3
        ranked = sorted(arrived, key=lambda n: (-search.scores[n], n))
        assert set(ranked[:places]) <= went_on
        assert len(went_on) <= max(2 * places, 1)


@given(searches(interrupts=False))
@settings(max_examples=100, deadline=None)
def test_the_same_results_in_the_same_order_give_the_same_jobs(search):
    again = deepcopy(search)
    search.run()
    again.run()
    assert search.jobs == again.jobs
    # no epoch is trained twice, and each job goes on where the one before ended
    for number in search.trials:
        untils = [job.until for job in search.jobs if job.number == number]
        assert untils == list(RUNGS[: len(untils)])


@given(searches(interrupts=False), st.integers(1, 60))
@settings(max_examples=200, deadline=None)
def test_the_records_alone_give_the_plan_of_whoever_saw_them_come(search, num_jobs):
    """One worker, so that nothing trains at that moment."""
    halving = search.halving()
    for _ in range(num_jobs):
        if (job := halving.next()) is None:
            break
        search.trials.setdefault(job.number, trial(job.number))
        search.train(job.number, job.until)
        halving.ended(search.trials[job.number])
    assert search.halving().next() == halving.next()
