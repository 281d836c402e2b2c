"""What a search tries, also after an interruption."""

from __future__ import annotations

import pytest

from fer_ray.sweeps.halving import Halving
from fer_ray.sweeps.losses import GpuFailed, Losses
from fer_ray.sweeps.search import Planner, Suggestions
from fer_ray.sweeps.space import Range
from fer_ray.sweeps.store import FAILED, FINISHED, UNFINISHED, SweepFolder, Trial

RANGES = {
    "optimizer.learning_rate": Range(low=0.001, high=1.0, log=True),
    "model.width": Range(low=4, high=16, step=4),
    "transforms.normalization": ("none", "minmax"),
}


def rows(*scores: float) -> list[dict]:
    return [{"epoch": e, "validation_accuracy": score} for e, score in enumerate(scores, 1)]


@pytest.fixture
def sweep(tmp_path):
    files = SweepFolder(str(tmp_path))
    for number in range(6):
        files.create(Trial(number=number, arm=None, options={}))
    return files


def test_suggestions_stay_in_their_ranges_and_follow_seed_number_and_what_is_known():
    suggestions = Suggestions(RANGES, seed=3)
    asked = [suggestions.ask(number, []) for number in range(8)]
    other = Suggestions(RANGES, seed=3)
    assert other.ask(5, []) == asked[5] and other.ask(0, []) == asked[0]
    assert Suggestions(RANGES, seed=4).ask(5, []) != asked[5]
    assert len({str(one) for one in asked}) == 8
    for chosen in asked:
        assert 0.001 <= chosen["optimizer.learning_rate"] <= 1
        assert chosen["model.width"] in (4, 8, 12, 16)
        assert chosen["transforms.normalization"] in ("none", "minmax")


def known(number: int, *scores: float, status: str = UNFINISHED) -> Trial:
    """Of every width, each with both normalizations."""
    chosen = {
        "optimizer.learning_rate": 0.1,
        "model.width": 4 * (1 + number // 2 % 4),
        "transforms.normalization": ("none", "minmax")[number % 2],
    }
    return Trial(number=number, arm=None, options=chosen, history=rows(*scores), status=status)


def fraction_of_minmax(trials: list[Trial]) -> float:
    suggestions = Suggestions(RANGES, seed=0)
    asked = [suggestions.ask(100 + number, trials) for number in range(20)]
    return sum(one["transforms.normalization"] == "minmax" for one in asked) / 20


def test_suggestions_lean_to_what_was_good_and_to_what_was_promoted():
    finished = [known(n, 0.9 if n % 2 else 0.1, status=FINISHED) for n in range(32)]
    assert fraction_of_minmax(finished) >= 0.75
    assert fraction_of_minmax(finished[::-1]) == fraction_of_minmax(finished)
    paused = [known(n, 0.9 if n % 2 else 0.1) for n in range(32)]
    assert fraction_of_minmax(paused) >= 0.75
    # of two that are paused, what came further is better, whatever its score
    further = [known(n, *([0.2] * 3 if n % 2 else [0.5])) for n in range(32)]
    assert fraction_of_minmax(further) >= 0.75


def test_what_has_no_result_yet_counts_as_bad_and_what_failed_not_at_all():
    half = [known(n, 0.5) for n in range(16)]
    begun = [known(n) for n in range(17, 64, 2)]
    assert fraction_of_minmax(half + begun) < fraction_of_minmax(half)
    failed = [known(n, status=FAILED) for n in range(16, 64)]
    assert fraction_of_minmax(half + failed) == fraction_of_minmax(half)


def test_the_planner_hands_out_jobs_and_waits_for_those_that_train(sweep):
    for number in (0, 1):
        sweep.trial(number).end(FINISHED)
    halving = Halving((1, 3), 7, sweep.trials())
    made: list[int] = []

    def make(number: int) -> Trial:
        made.append(number)
        sweep.create(Trial(number=number, arm=None, options={}))
        return sweep.trial(number).read()

    planner = Planner(sweep, halving, Losses(3, lambda avoided: True), make)
    handed = [planner.suggest(str(n)) for n in range(6)]
    assert handed == [*({"number": n, "until": 1, "avoid": []} for n in (2, 3, 4, 5, 6)), None]
    assert made == [6]
    sweep.trial(3).end(FAILED)
    planner.on_trial_complete("1", None)
    planner.on_trial_complete("0", None, error=True)
    assert {n: halving.trials[n].status for n in (2, 3)} == {2: UNFINISHED, 3: FAILED}
    assert planner.suggest("then") is None, "what follows from a loss is decided elsewhere"
    sweep.trial(2).end(FAILED)
    halving.ended(sweep.trial(2).read())
    for trial_id, number in (("2", 4), ("3", 5), ("4", 6)):
        assert planner.suggest("then") is None
        sweep.trial(number).end(FAILED)
        planner.on_trial_complete(trial_id, None)
    assert planner.suggest("then") == Planner.FINISHED


def test_a_trial_that_was_lost_avoids_the_node_and_none_begins_without_a_node(sweep):
    for number in range(4):
        sweep.create(Trial(number=number, arm=None, options={}))
    halving = Halving((3,), 4, sweep.trials())
    losses = Losses(0, lambda avoided: avoided != {"a", "b"})
    planner = Planner(sweep, halving, losses, create=lambda number: None)
    for trial_id, node in (("0", "a"), ("1", "a"), ("2", "b")):
        number = planner.suggest(trial_id)["number"]
        planner.on_trial_complete(trial_id, None, error=True)
        losses.record(number, GpuFailed("no driver", node))
        halving.ended(sweep.trial(number).read())
    assert planner.suggest("3") == {"number": 0, "until": 3, "avoid": ["a"]}
    losses.record(1, GpuFailed("no driver", "b"))
    assert planner.suggest("4") == Planner.FINISHED
    assert not any(trial.is_over for trial in sweep.trials())
