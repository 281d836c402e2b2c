"""A sweep's summary: its numbers and its sentences."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sweep_samples as samples
from conftest import ROOT
from sweep_samples import ARMS, BASE, CLAHE, MINMAX, read_page, saved, table
from test_report import Page

from fer_ray.config import overrides
from fer_ray.reporting import text
from fer_ray.sweeps import importance, report, sentences, store, summary
from fer_ray.sweeps.space import Range
from fer_ray.sweeps.store import FAILED, FINISHED, SweepFolder, Trial


def arm_of(made: dict, name: str) -> dict:
    return next(arm for arm in made["arms"] if arm["arm"] == name)


# -- designed sweeps ------------------------------------------------------------------------


def test_the_score_is_the_accuracy_after_the_last_epoch(tmp_path: Path):
    # a better epoch before the last does not count
    history = samples.history(0.5)
    history[1]["validation_accuracy"] = 0.9
    trials = [
        Trial(number=number, arm=arm.name, options=options_, status=FINISHED, history=history)
        for number, arm in enumerate(ARMS)
        for options_ in [{**arm.options, "schedule.seed": 0}]
    ]
    made = summary.summarize(
        str(samples.save(tmp_path / "s", trials, config=samples.base(), arms=ARMS))
    )
    assert [arm["accuracy"]["mean"] for arm in made["arms"]] == [0.5] * 3
    assert [arm["macro_f1"]["mean"] for arm in made["arms"]] == pytest.approx([0.45] * 3)


def test_trials_are_counted_by_status(tmp_path: Path):
    values = {BASE: [0.5, 0.51, 0.52], MINMAX: [0.5, "diverged", None], CLAHE: ["a", "b", "c"]}
    made = summary.summarize(str(saved(tmp_path, table(values))))
    assert made["trials"] == {
        "planned": 9,
        "finished": 4,
        "stopped": 0,
        "failed": 4,
        "unfinished": 1,
    }
    assert made["num_epochs_run"] == 4 * samples.EPOCHS
    assert made["training_s"] == pytest.approx(28.7 * 4 * samples.EPOCHS)
    assert made["images_per_s"] == 1000
    assert made["failures"][1] == {"trial": 4, "arm": MINMAX, "reason": "diverged"}
    assert [failure["trial"] for failure in made["failures"]] == [2, 4, 5, 8]
    assert (arm_of(made, MINMAX)["num_seeds"], arm_of(made, MINMAX)["num_failed"]) == (1, 1)


def test_known_effects_are_shown_and_others_are_not(grid: Path):
    made = summary.summarize(str(grid))
    shown = {arm["arm"].partition("=")[2]: arm["accuracy"]["shown"] for arm in made["arms"]}
    assert shown.pop("none") is None
    assert {name for name, one in shown.items() if one} == set(samples.EFFECTS)
    for name, effect in samples.EFFECTS.items():
        one = arm_of(made, f"normalization={name}")["accuracy"]
        assert one["difference_low"] < effect < one["difference_high"]
    assert made["comparison"]["num_comparisons"] == 7
    assert made["comparison"]["agreement"] == {
        "rank_correlation": pytest.approx(1.0),
        "same_winner": True,
        "same_conclusions": True,
    }
    assert (made["winner"]["arm"], made["winner"]["differs"]) == (CLAHE, True)


def test_the_sentences_of_a_comparison(tmp_path: Path):
    values = {
        BASE: [0.500, 0.520, 0.540],
        MINMAX: [0.499, 0.529, 0.544],
        CLAHE: [0.601, 0.620, 0.641],
    }
    made = summary.summarize(str(saved(tmp_path, table(values))))
    text = {arm["arm"]: sentences.compared(arm, made) for arm in made["arms"][1:]}
    assert re.fullmatch(
        r"normalization=minmax: \+0\.4 points \(−0\.\d to \d\.\d\), no effect shown "
        r"\(p = 0\.\d{3}, corrected = 0\.\d{3}, n = 3\)\.",
        text[MINMAX],
    )
    assert re.match(
        r"normalization=clahe: \+10\.1 points \(9\.\d to 1\d\.\d\), better than", text[CLAHE]
    )
    smallest = made["comparison"]["accuracy"]["smallest_shown"]
    assert f"It could show differences of {100 * smallest:.1f} points" in made["conclusions"][2]


def test_a_worse_arm_is_called_worse(tmp_path: Path):
    values = {BASE: [0.5, 0.52, 0.54], MINMAX: [0.4, 0.421, 0.44], CLAHE: [0.5, 0.521, 0.54]}
    made = summary.summarize(str(saved(tmp_path, table(values))))
    assert "−10.0 points" in sentences.compared(arm_of(made, MINMAX), made)
    assert "worse than the baseline" in sentences.compared(arm_of(made, MINMAX), made)
    assert made["conclusions"][1] == (
        f"The pilot shows an effect in 1 of 2 comparisons with {BASE} (n = 3): {MINMAX} is worse "
        "(−10.0 points)."
    )


def test_one_seed_shows_nothing(tmp_path: Path):
    values = {BASE: [0.5], MINMAX: [0.7], CLAHE: [0.6]}
    made = summary.summarize(str(saved(tmp_path, table(values), seeds=[0])))
    assert sentences.compared(arm_of(made, MINMAX), made) == (
        "normalization=minmax: +20.0 points; with n = 1 it cannot be tested."
    )
    (only,) = made["conclusions"]  # none about effects by macro-F1 either
    assert "With n = 1 no difference can be tested." in only
    assert arm_of(made, MINMAX)["accuracy"]["difference_low"] is None
    assert made["comparison"]["accuracy"]["smallest_shown"] is None
    page = Page(report.render(made, SweepFolder(str(tmp_path / "sweep")).read_table()))
    assert "with n\u00a0=\u00a01 it cannot be tested" in page.text


def test_failed_arms_and_missing_seeds_are_reported(tmp_path: Path):
    values = {BASE: [0.5, 0.51, 0.53], MINMAX: [0.5, 0.52, "diverged"], CLAHE: ["a", "b", "c"]}
    folder = saved(tmp_path, table(values))
    made = summary.summarize(str(folder))
    assert "n = 2 of 3" in sentences.compared(arm_of(made, MINMAX), made)
    assert (
        sentences.compared(arm_of(made, CLAHE), made) == f"{CLAHE}: no finished trial (3 failed)."
    )
    page = Page(report.render(made, SweepFolder(str(folder)).read_table()))
    assert "Failed trials" in page.text and "diverged" in page.text
    assert any(line.startswith("4 of 9 trials failed") for line in made["caveats"])


def test_the_winner_has_as_many_seeds_as_any(tmp_path: Path):
    values = {BASE: [0.5, 0.51, 0.52], MINMAX: [0.6, 0.61, None], CLAHE: [0.51, 0.52, 0.53]}
    made = summary.summarize(str(saved(tmp_path, table(values))))
    assert made["winner"]["arm"] == CLAHE
    assert made["winner"]["score"] == pytest.approx(0.52)
    assert made["conclusions"][0].startswith(f"Highest mean accuracy: {CLAHE}")
    caveats = " ".join(made["caveats"])
    assert f"Seeds are missing: {MINMAX} has 2 of 3. The winner is chosen among" in caveats
    assert "Interim result: 1 of 9" in caveats


def test_a_winner_without_a_shown_effect_is_reported_as_such(tmp_path: Path):
    values = {BASE: [0.5, 0.54, 0.52], MINMAX: [0.53, 0.52, 0.53], CLAHE: [0.4, 0.55, 0.5]}
    made = summary.summarize(str(saved(tmp_path, table(values))))
    assert (made["winner"]["arm"], made["winner"]["differs"]) == (MINMAX, False)
    assert f"does not show that it differs from the baseline {BASE}." in made["conclusions"][0]
    shown = f"The pilot shows no effect in any of 2 comparisons with {BASE} (n = 3)."
    assert shown in made["conclusions"]


def test_macro_f1_that_disagrees_is_reported(tmp_path: Path):
    trials = [
        Trial(
            number=3 * seed + number,
            arm=arm.name,
            options={**arm.options, "schedule.seed": seed},
            status=FINISHED,
            history=samples.history(
                0.5 + number / 50 + jitter,
                macro_f1=0.5 - number / 50 + 0.0004 * (seed * number % 2),
            ),
        )
        for seed, jitter in enumerate((0.0, 0.011, 0.0205))
        for number, arm in enumerate(ARMS)
    ]
    trials[4].history[-1]["validation_accuracy"] += 0.0007  # some noise
    folder = samples.save(tmp_path / "s", trials, config=samples.base(), arms=ARMS)
    made = summary.summarize(str(folder))
    agreement = made["comparison"]["agreement"]
    assert agreement["rank_correlation"] == pytest.approx(-1.0)
    assert not agreement["same_winner"] and not agreement["same_conclusions"]
    (line,) = [line for line in made["conclusions"] if "By macro-F1" in line]
    assert "another arm is first" in line and "tau = −1.00" in line
    assert f"{MINMAX} is worse (−2.0 points), {CLAHE} is worse (−4.0 points);" in line


def test_conclusions_give_the_number_of_finished_seeds(tmp_path: Path):
    """An interrupted sweep has fewer than were planned."""
    values = {name: [0.5, 0.52 + number / 100, None, None]
              for number, name in enumerate((BASE, MINMAX, CLAHE))}  # fmt: skip
    made = summary.summarize(str(saved(tmp_path, table(values), seeds=[0, 1, 2, 3])))
    text = " ".join(made["conclusions"])
    assert f"comparisons with {BASE} (n = 2 of 4)." in text
    values[CLAHE] = [0.5, 0.53, 0.51, None]
    made = summary.summarize(str(saved(tmp_path, table(values), seeds=[0, 1, 2, 3])))
    assert "(n = 2 to 3 of 4)." in " ".join(made["conclusions"])


def test_seeds_that_were_added_after_a_look_are_reported(tmp_path: Path):
    values = {BASE: [0.5, 0.51, 0.52], MINMAX: [0.5, 0.53, 0.54], CLAHE: [0.51, 0.5, 0.53]}
    folder = saved(tmp_path, table(values), fewer_seeds_before=[1, 2])
    caveats = " ".join(summary.summarize(str(folder))["caveats"])
    assert "Seeds were added after results with 1 and 2 had been seen" in caveats


def test_trials_that_were_computed_in_different_ways_are_reported(tmp_path: Path):
    values = {BASE: [0.5, 0.51, 0.52], MINMAX: [0.5, 0.53, 0.54], CLAHE: [0.51, 0.5, 0.53]}
    trials = samples.grid(ARMS, (0, 1, 2), table(values))
    ran_on = {"hardware": "A, 2 cores", "computed_in": "float32", "versions": "torch 2, ray 3"}
    for index, trial in enumerate(trials):
        other = {"computed_in": "bfloat16"} if index > 6 else {}
        trials[index] = dataclasses.replace(trial, ran_on=ran_on | other)
    folder = samples.save(tmp_path / "s", trials, config=samples.base(), arms=ARMS)
    made = summary.summarize(str(folder))
    assert made["ran_on"] == [
        {"on": "A, 2 cores in float32 (torch 2, ray 3)", "trials": 7},
        {"on": "A, 2 cores in bfloat16 (torch 2, ray 3)", "trials": 2},
    ]
    assert any("which may cause effects: 7 on A" in line for line in made["caveats"])
    alike = [dataclasses.replace(trial, ran_on=ran_on) for trial in trials]
    samples.save(tmp_path / "s", alike, config=samples.base(), arms=ARMS)
    assert not any("different ways" in line for line in summary.summarize(str(folder))["caveats"])


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"train_fraction": 0.25, "parameters": 10**6}, "25 % of the train split"),
        ({"parameters": 300_000}, "the model is small (0.3 M parameters)"),
        ({"parameters": 300_001}, None),
        ({"parameters": 10**6, "most_parameters": 200_000}, "the model is small (0.2 M"),
        ({"parameters": 200_000, "most_parameters": 10**6}, None),
    ],
)
def test_a_pilot_is_called_one(tmp_path: Path, settings: dict, reason: str | None):
    values = {BASE: [0.5, 0.51], MINMAX: [0.5, 0.52], CLAHE: [0.5, 0.53]}
    made = summary.summarize(str(saved(tmp_path, table(values), seeds=[0, 1], **settings)))
    pilot = [line for line in made["caveats"] if line.startswith("This is a pilot")]
    assert (reason in pilot[0]) if reason else not pilot


def test_before_any_trial_the_summary_has_no_result(tmp_path: Path):
    for method in ({"arms": ARMS}, {"ranges": {"transforms.flip": Range(low=0.0, high=0.5)}}):
        folder = samples.save(tmp_path / "s", [], config=samples.base(), num_trials=9, **method)
        made = summary.write(str(folder))
        assert made["winner"] is None and made["trials"]["unfinished"] == 9
        assert made["conclusions"] == ["No trial has finished yet, so there is no result."]
        assert "there is no result" in sentences.as_text(made)
        report.publish(str(folder))
        assert "there is no result" in Page(read_page(folder)).text


def test_the_summary_of_the_recorded_pilot_is_up_to_date():
    """The README shows its sentences: write it again after a change of them or of the settings."""
    folder = ROOT / "results/reference/sweeps/normalization"
    recorded = json.loads((folder / store.SUMMARY).read_text())
    made = summary.summarize(str(folder))
    for key in ("conclusions", "caveats", "winner"):
        assert made[key] == recorded[key]


# -- searches -------------------------------------------------------------------------------


def test_the_best_of_a_search_and_its_settings(search: Path):
    made = summary.summarize(str(search))
    frame = pd.read_parquet(search / store.TRIALS)
    last = frame[(frame["status"] == FINISHED) & (frame["epoch"] == 9)]
    ranked = last.sort_values("validation_accuracy", ascending=False)
    assert [trial["trial"] for trial in made["best"]] == ranked["trial"].head(10).tolist()
    first = ranked.iloc[0]
    assert made["winner"]["score"] == first["validation_accuracy"]
    for name, value in made["winner"]["settings"].items():
        cell = importance.plain(first[overrides.column_of(name)])
        assert value == cell, name
    assert made["winner"]["options"].keys() == made["space"].keys()
    assert "is optimistic" in made["conclusions"][0]


def test_importance_finds_the_option_that_decides(search: Path):
    made = summary.summarize(str(search))
    shares = made["importance"]["shares"]
    assert next(iter(shares)) == "optimizer.learning_rate"
    assert sum(shares.values()) == pytest.approx(1.0)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    assert made["importance"]["predicted"] > 0
    assert made["importance"]["num_trials"] == 39
    assert made["importance"] == summary.summarize(str(search))["importance"]


def _rows(reached: list[int], status: list[str]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"trial": trial, "epoch": epoch, "status": state}
            for trial, (last, state) in enumerate(zip(reached, status))
            for epoch in range(1, last + 1)
        ],
        columns=["trial", "epoch", "status"],
    )


def test_trials_are_compared_at_the_epoch_that_nine_in_ten_reached():
    assert importance.common_epoch(_rows([9] * 10, [FINISHED] * 10)) == 9
    assert importance.common_epoch(_rows([9] * 9 + [2], [FINISHED] * 10)) == 9
    assert importance.common_epoch(_rows([9] * 8 + [2, 3], [FINISHED] * 10)) == 3
    assert importance.common_epoch(_rows([9] * 8 + [2, 1], [FINISHED] * 8 + [FAILED] * 2)) == 9
    assert importance.common_epoch(_rows([], [])) == 0


def test_importance_that_is_noise_is_called_so(tmp_path: Path):
    random = np.random.default_rng(0)
    ranges = {f"transforms.{name}": Range(low=0.0, high=0.5) for name in ("flip", "crop", "zoom")}
    trials = [
        Trial(
            number=number,
            arm=None,
            options={"schedule.seed": 0, **{name: random.uniform(0, 0.5) for name in ranges}},
            status=FINISHED,
            history=samples.history(random.uniform(0.4, 0.6)),
        )
        for number in range(12)
    ]
    folder = samples.save(tmp_path / "s", trials, config=samples.base(), ranges=ranges)
    text = " ".join(summary.summarize(str(folder))["conclusions"])
    assert "The importance is noise" in text and "fewer than 30 trials" in text


@pytest.mark.parametrize("number", [1, 3, 8])
def test_a_search_without_differences_has_no_importance(tmp_path: Path, number: int):
    ranges = {"transforms.flip": Range(low=0.0, high=0.5)}
    trials = [
        Trial(
            number=one,
            arm=None,
            options={"schedule.seed": 0, "transforms.flip": one / 20},
            status=FINISHED,
            history=samples.history(0.5),
        )
        for one in range(number)
    ]
    folder = samples.save(tmp_path / "s", trials, config=samples.base(), ranges=ranges)
    made, _ = report.publish(str(folder))
    assert not made["importance"]["shares"] and made["importance"]["reason"]
    assert made["importance"]["reason"] in " ".join(made["conclusions"])


def test_numbers_as_text():
    assert sentences.points(0.004) == "+0.4" and sentences.points(-0.0123) == "−1.2"
    assert (
        sentences.points(-0.0001) == sentences.points(0.0001) == "0.0"
        and sentences.points(None) == "–"
    )
    assert sentences.between(-0.002, 0.01) == "−0.2 to 1.0" and sentences.between(None, None) == "–"
    assert text.p_value(0.0004) == "< 0.001" and text.p_value(0.0123) == "0.012"
    assert text.percent(0.5512) == "55.1" and math.isclose(float(text.percent(1.0)), 100)
