"""Which trials a search tries and stops, also after an interruption."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fer_ray.sweeps import records
from fer_ray.sweeps.records import FINISHED, STOPPED, Trial
from fer_ray.sweeps.search import Halving, Planner, Suggestions, first_rung
from fer_ray.sweeps.space import Range

RANGES = {
    "optimizer.learning_rate": Range(low=0.001, high=1.0, log=True),
    "model.width": Range(low=4, high=16, step=4),
    "transforms.normalization": ("none", "minmax"),
}


def rows(*scores: float) -> list[dict]:
    return [{"epoch": e, "validation_accuracy": score} for e, score in enumerate(scores, 1)]


def live(number: int) -> SimpleNamespace:
    return SimpleNamespace(trial_id=f"by tune {number}", config={"number": number})


@pytest.fixture
def sweep(tmp_path):
    for number in range(6):
        records.create(str(tmp_path), Trial(number=number, arm=None, options={}))
    return str(tmp_path)


def test_halving_stops_what_is_below_the_best_third_and_writes_it_down(sweep):
    scheduler = Halving(sweep, 9, [])
    assert first_rung(9) == 1
    scores, decisions = [0.5, 0.6, 0.4, 0.7], []
    for number, score in enumerate(scores):
        scheduler.on_trial_add(None, live(number))
        (row,) = rows(score)
        decisions.append(scheduler.on_trial_result(None, live(number), row))
    # the first has none to be compared with; 0.4 is below the best third of 0.5 and 0.6
    assert decisions == ["CONTINUE", "CONTINUE", "STOP", "CONTINUE"]
    assert [records.read_trial(sweep, n).status == STOPPED for n in range(4)] == [
        *(False, False, True, False)
    ]
    assert "epoch 1" in (records.read_trial(sweep, 2).reason or "")


def test_halving_lets_the_last_epoch_pass(sweep):
    scheduler = Halving(sweep, 3, [])
    for number, score in ((0, 0.9), (1, 0.1)):
        scheduler.on_trial_add(None, live(number))
        row = {"epoch": 3, "validation_accuracy": score}
        assert scheduler.on_trial_result(None, live(number), row) == "CONTINUE"


def test_halving_goes_on_with_what_earlier_sittings_saw_and_counts_each_once(sweep):
    earlier = [
        Trial(number=0, arm=None, options={}, history=rows(0.5, 0.6), status=FINISHED),
        Trial(number=1, arm=None, options={}, history=rows(0.7)),
    ]
    scheduler = Halving(sweep, 9, earlier)
    scheduler.on_trial_add(None, live(1))  # it goes on under another id of Ray Tune's
    (_, second) = rows(0.7, 0.1)
    assert scheduler.on_trial_result(None, live(1), second) == "CONTINUE"
    scheduler.on_trial_add(None, live(2))
    assert scheduler.on_trial_result(None, live(2), rows(0.6)[0]) == "STOP"
    scheduler.on_trial_add(None, live(3))
    assert scheduler.on_trial_result(None, live(3), rows(0.8)[0]) == "CONTINUE"


def test_suggestions_stay_in_their_ranges_and_follow_the_seed():
    first, again = Suggestions(RANGES, seed=3), Suggestions(RANGES, seed=3)
    asked = [first.ask(number) for number in range(8)]
    assert asked == [again.ask(number) for number in range(8)]
    for chosen in asked:
        assert 0.001 <= chosen["optimizer.learning_rate"] <= 1
        assert chosen["model.width"] in (4, 8, 12, 16)
        assert chosen["transforms.normalization"] in ("none", "minmax")


def test_suggestions_remember_and_lean_to_what_was_good():
    suggestions = Suggestions(RANGES, seed=0)
    for number in range(30):
        width, minmax = 4 * (1 + number % 4), number % 2
        chosen = {
            "optimizer.learning_rate": 0.1,
            "model.width": width,
            "transforms.normalization": ("none", "minmax")[minmax],
        }
        score = 0.9 if minmax else 0.1
        suggestions.remember(
            Trial(number=number, arm=None, options=chosen, history=rows(score), status=FINISHED)
        )
    asked = [suggestions.ask(100 + number) for number in range(20)]
    assert sum(one["transforms.normalization"] == "minmax" for one in asked) >= 15


def test_an_unfinished_trial_is_remembered_with_its_options_and_told_later():
    suggestions = Suggestions(RANGES, seed=0)
    chosen = {
        "optimizer.learning_rate": 0.02,
        "model.width": 8,
        "transforms.normalization": "none",
    }
    suggestions.remember(Trial(number=0, arm=None, options=chosen))
    over = Trial(number=0, arm=None, options=chosen, history=rows(0.4), status=FINISHED)
    suggestions.tell(over)
    (known,) = suggestions._study.trials
    assert known.params == chosen and known.value == 0.4
    suggestions.tell(over)  # a second time it is not counted
    assert len(suggestions._study.trials) == 1


def test_the_planner_hands_out_what_waits_then_what_is_new_then_nothing(sweep):
    made = iter([Trial(number=6, arm=None, options={})])
    ended: list[int] = []
    planner = Planner(
        sweep,
        [2, 4],
        num_new=1,
        suggest=lambda: next(made),
        ended=lambda trial: ended.append(trial.number),
    )
    handed = [planner.suggest(str(n)) for n in range(4)]
    assert handed == [{"number": 2}, {"number": 4}, {"number": 6}, Planner.FINISHED]
    planner.on_trial_complete("0", None)  # the time budget was used up
    records.end(sweep, 4, FINISHED)
    planner.on_trial_complete("1", None)
    assert ended == [4]
