"""A sweep's summary, its page, its words, and the winner as the settings of a training run."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import sweep_samples as samples
from conftest import ROOT
from test_report import HOSTILE, Page, browse

from fer_ray import cli, figures, options
from fer_ray.config import TrainConfig
from fer_ray.errors import UserError
from fer_ray.sweeps import importance, records, report, summary, winner, words
from fer_ray.sweeps.records import FAILED, FINISHED, Trial
from fer_ray.sweeps.space import Arm, Range

ARMS = tuple(
    Arm(name=f"normalization={one}", options={"transforms.normalization": one})
    for one in ("none", "minmax", "clahe")
)
BASE, MINMAX, CLAHE = (arm.name for arm in ARMS)


def saved(place: Path, score, *, seeds=(0, 1, 2), arms=ARMS, **settings) -> Path:
    """A grid of three arms whose scores a function of arm and seed gives."""
    trials = samples.grid(arms, seeds, score)
    return samples.save(place / "sweep", trials, config=samples.base(), arms=arms, **settings)


def table(values: dict[str, list]):
    return lambda arm, seed: values[arm][seed]


@pytest.fixture(scope="module")
def grid(tmp_path_factory) -> Path:
    return samples.normalization(tmp_path_factory.mktemp("sweeps") / "normalization")


@pytest.fixture(scope="module")
def search(tmp_path_factory) -> Path:
    return samples.search(tmp_path_factory.mktemp("sweeps") / "search")


def arm_of(made: dict, name: str) -> dict:
    return next(arm for arm in made["arms"] if arm["arm"] == name)


# -- designed sweeps ------------------------------------------------------------------------


def test_the_score_is_the_accuracy_after_the_last_epoch(tmp_path: Path):
    # a better epoch before the last counts nothing
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


def test_what_was_run_is_counted(tmp_path: Path):
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
    assert [one["trial"] for one in made["failures"]] == [2, 4, 5, 8]
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
    text = {arm["arm"]: words.compared(arm, made) for arm in made["arms"][1:]}
    assert re.fullmatch(
        r"normalization=minmax: \+0\.4 points \(−0\.\d to \d\.\d\), no effect shown at n = 3 "
        r"\(p = 0\.\d{3}, corrected 0\.\d{3}\)\.",
        text[MINMAX],
    )
    assert re.match(
        r"normalization=clahe: \+10\.1 points \(9\.\d to 1\d\.\d\), better than", text[CLAHE]
    )
    smallest = made["comparison"]["accuracy"]["smallest_shown"]
    assert any(f"n = 3 could have shown is {100 * smallest:.1f} points" in line
               for line in made["conclusions"])  # fmt: skip


def test_a_worse_arm_is_called_worse(tmp_path: Path):
    values = {BASE: [0.5, 0.52, 0.54], MINMAX: [0.4, 0.421, 0.44], CLAHE: [0.5, 0.521, 0.54]}
    made = summary.summarize(str(saved(tmp_path, table(values))))
    assert "−10.0 points" in words.compared(arm_of(made, MINMAX), made)
    assert "worse than the baseline" in words.compared(arm_of(made, MINMAX), made)
    assert made["conclusions"][1] == f"Shown to be worse than {BASE}: {MINMAX}."


def test_one_seed_concludes_nothing(tmp_path: Path):
    values = {BASE: [0.5], MINMAX: [0.7], CLAHE: [0.6]}
    made = summary.summarize(str(saved(tmp_path, table(values), seeds=[0])))
    assert words.compared(arm_of(made, MINMAX), made) == (
        "normalization=minmax: +20.0 points; nothing can be concluded at n = 1."
    )
    (only,) = made["conclusions"]  # nor is anything said of effects by macro-F1
    assert "nothing can be concluded" in only
    assert arm_of(made, MINMAX)["accuracy"]["difference_low"] is None
    assert made["comparison"]["accuracy"]["smallest_shown"] is None
    page = Page(report.render(made, records.read_trials(str(tmp_path / "sweep"))))
    assert "nothing can be concluded at n\u00a0=\u00a01" in page.text


def test_failed_arms_and_missing_seeds_are_said(tmp_path: Path):
    values = {BASE: [0.5, 0.51, 0.53], MINMAX: [0.5, 0.52, "diverged"], CLAHE: ["a", "b", "c"]}
    folder = saved(tmp_path, table(values))
    made = summary.summarize(str(folder))
    assert "n = 2 of 3" in words.compared(arm_of(made, MINMAX), made)
    assert words.compared(arm_of(made, CLAHE), made) == f"{CLAHE}: no finished trial (3 failed)."
    page = Page(report.render(made, records.read_trials(str(folder))))
    assert "Failed trials" in page.text and "diverged" in page.text
    assert any("4 of 9 trials" in line for line in made["caveats"])


def test_the_winner_has_as_many_seeds_as_any(tmp_path: Path):
    values = {BASE: [0.5, 0.51, 0.52], MINMAX: [0.6, 0.61, None], CLAHE: [0.51, 0.52, 0.53]}
    made = summary.summarize(str(saved(tmp_path, table(values))))
    assert made["winner"]["arm"] == CLAHE
    assert made["winner"]["score"] == pytest.approx(0.52)
    assert any(line.startswith("Interim: 1 of 9") for line in made["caveats"])


def test_a_winner_without_a_shown_effect_is_said_to_be_none(tmp_path: Path):
    values = {BASE: [0.5, 0.54, 0.52], MINMAX: [0.53, 0.52, 0.53], CLAHE: [0.4, 0.55, 0.5]}
    made = summary.summarize(str(saved(tmp_path, table(values))))
    assert (made["winner"]["arm"], made["winner"]["differs"]) == (MINMAX, False)
    assert f"no difference to the baseline {BASE} is shown" in made["conclusions"][0]
    assert "No effect shown in any of 2 comparisons at n = 3." in made["conclusions"]


def test_macro_f1_that_disagrees_is_reported(tmp_path: Path):
    trials = [
        Trial(
            number=3 * seed + number,
            arm=arm.name,
            options={**arm.options, "schedule.seed": seed},
            status=FINISHED,
            history=samples.history(0.5 + number / 50 + jitter, macro_f1=0.5 - number / 50),
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
    assert "another arm is first" in line and "−1.00" in line


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"train_fraction": 0.25, "parameters": 10**6}, "25 % of the train split"),
        ({"parameters": 300_000}, "the model is small (0.3 M parameters)"),
        ({"parameters": 300_001}, None),
    ],
)
def test_a_pilot_is_called_one(tmp_path: Path, settings: dict, said: str | None):
    values = {BASE: [0.5, 0.51], MINMAX: [0.5, 0.52], CLAHE: [0.5, 0.53]}
    made = summary.summarize(str(saved(tmp_path, table(values), seeds=[0, 1], **settings)))
    pilot = [line for line in made["caveats"] if line.startswith("This is a pilot")]
    assert (said in pilot[0]) if said else not pilot


def test_before_any_trial_there_is_a_summary_that_says_so(tmp_path: Path):
    for method in ({"arms": ARMS}, {"ranges": {"transforms.flip": Range(low=0.0, high=0.5)}}):
        folder = samples.save(tmp_path / "s", [], config=samples.base(), num_trials=9, **method)
        made = summary.write(str(folder))
        assert made["winner"] is None and made["trials"]["unfinished"] == 9
        assert made["conclusions"] == ["No trial has finished: there is nothing to conclude."]
        assert "nothing to conclude" in summary.as_text(made)
        assert "nothing to conclude" in Page(report.publish(str(folder))[1] and _read(folder)).text


def _read(folder: Path) -> str:
    return (folder / "report.html").read_text()


# -- searches -------------------------------------------------------------------------------


def test_the_best_of_a_search_and_its_settings(search: Path):
    made = summary.summarize(str(search))
    frame = pd.read_parquet(search / records.TRIALS)
    last = frame[(frame["status"] == FINISHED) & (frame["epoch"] == 9)]
    ranked = last.sort_values("validation_accuracy", ascending=False)
    assert [one["trial"] for one in made["best"]] == ranked["trial"].head(10).tolist()
    first = ranked.iloc[0]
    assert made["winner"]["score"] == first["validation_accuracy"]
    for name, value in made["winner"]["settings"].items():
        cell = importance.plain(first[options.column_of(name)])
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
    told = " ".join(summary.summarize(str(folder))["conclusions"])
    assert "the shares are noise" in told and "fewer than 30 trials" in told


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


# -- the page -------------------------------------------------------------------------------


def test_summary_json_is_json_without_nan(grid: Path, search: Path):
    for folder in (grid, search):
        made = summary.write(str(folder))
        text = (folder / records.SUMMARY).read_text()
        assert "NaN" not in text and "Infinity" not in text
        assert json.loads(text) == made


@pytest.mark.parametrize("kind", ["grid", "search"])
def test_the_page_needs_nothing_and_shows_the_numbers(kind: str, request):
    folder = request.getfixturevalue(kind)
    made, place = report.publish(str(folder))
    assert place == str(folder / "report.html")
    html = _read(folder)
    page = Page(html)
    text = page.text.replace("\u00a0", " ")
    assert "http:" not in html and "https:" not in html and "src=" not in html
    assert not re.search(r"@import|url\((?!#)", html)
    assert "/machine" not in html and str(folder) not in html
    assert page.all("meta")[2]["content"].startswith("default-src 'none'")
    for line in [*made["conclusions"], *made["caveats"], made["winner"]["command"]]:
        assert line in text
    for arm in made.get("arms", [])[1:]:
        assert words.compared(arm, made) in text
        assert f"{100 * arm['accuracy']['mean']:.1f}" in text
    assert len(page.all("svg")) == 3
    assert all(
        one["role"] == "img" and len(one["aria-label"] or "") > 20 for one in page.all("svg")
    )
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert all(one.get("scope") for one in page.all("th"))
    for stand_in in figures._VARIABLES:
        assert stand_in not in html
    report.publish(str(folder))
    assert _read(folder) == html


def test_names_from_data_are_escaped(tmp_path: Path):
    arms = tuple(
        Arm(name=name, options={"transforms.flip": number / 10})
        for number, name in enumerate((HOSTILE, "$\\frac{$", "b--><b>"))
    )
    values = {arms[0].name: [0.5, 0.51], arms[1].name: [0.5, HOSTILE], arms[2].name: [0.5, 0.53]}
    folder = saved(tmp_path, table(values), seeds=[0, 1], arms=arms)
    report.publish(str(folder))
    page = Page(_read(folder))
    assert not page.all("img") and not page.all("b--><b")
    assert not any(name.startswith("on") for _, one in page.tags for name in one)
    assert HOSTILE in page.text and "$\\frac{$" in page.text


def test_figures_are_well_formed(tmp_path: Path):
    values = {BASE: ["a", "b"], MINMAX: [0.5, None], CLAHE: [0.5, 0.52]}
    folder = saved(tmp_path, table(values), seeds=[0, 1])
    report.publish(str(folder))
    drawn = re.findall(r"<svg.*?</svg>", _read(folder), re.DOTALL)
    assert drawn and all(ET.fromstring(one).attrib["viewBox"] for one in drawn)


def test_the_page_replaces_nothing_else(grid: Path, tmp_path: Path):
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "evaluation.json").write_text("{}")
    with pytest.raises(UserError, match="holds an evaluation"):
        report.publish(str(grid), str(tmp_path / "evaluation"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        report.publish(str(grid), str(tmp_path / "file"))
    for output, page in (("new", "new/report.html"), ("page.html", "page.html")):
        assert report.publish(str(grid), str(tmp_path / output))[1] == str(tmp_path / page)
        assert (tmp_path / page).read_text().startswith("<!doctype html>")


def test_the_text_has_every_arm_and_the_command(grid: Path):
    made = summary.summarize(str(grid))
    text = summary.as_text(made)
    for arm in made["arms"]:
        assert re.search(rf"^{re.escape(arm['arm'])} +3 +{100 * arm['accuracy']['mean']:.1f} ",
                         text, re.MULTILINE)  # fmt: skip
    assert text.endswith(made["winner"]["command"])


# -- the winner as a training run -----------------------------------------------------------


def trained(monkeypatch, *flags: str) -> tuple[str | None, TrainConfig]:
    """The run's name and the settings that jobs/train.py would take."""
    parser = cli.JobParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--from-sweep")
    cli.add_config_flags(parser)
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", "data/faces", *map(str, flags)])
    name = cli.take_sweep(parser)
    return name, cli.config_from_flags(parser.parse_args(), data="data/faces")


def write_winner(folder: Path, chosen: dict) -> Path:
    """A sweep whose winner has some settings."""
    arms = (Arm(name="one", options=chosen),)
    saved(folder, lambda arm, seed: 0.5, seeds=[4], arms=arms)
    summary.write(str(folder / "sweep"))
    return folder / "sweep"


@pytest.mark.parametrize("kind", ["grid", "search"])
def test_the_winners_settings_and_its_command_are_the_same_run(kind: str, request, monkeypatch):
    folder = request.getfixturevalue(kind)
    made = summary.write(str(folder))
    name, config = trained(monkeypatch, "--from-sweep", folder)
    assert name == f"{folder.name}-winner"
    assert samples.settings_of(config) == made["winner"]["settings"]
    words_ = made["winner"]["command"].split()
    assert words_[:4] == [".venv/bin/python", "jobs/train.py", "--data", "data/faces"]
    assert words_[4:6] == ["--run", name]
    _, pasted = trained(monkeypatch, *words_[6:])
    assert pasted == config


def test_flags_that_are_given_win(tmp_path: Path, monkeypatch):
    folder = write_winner(tmp_path, {"transforms.flip": 0.25, "optimizer.learning_rate": 0.05})
    flags = ("--from-sweep", folder, "--epochs", 9, "--flip", 0.125)
    _, config = trained(monkeypatch, *flags)
    assert (config.schedule.epochs, config.transforms.flip) == (9, 0.125)
    assert (config.optimizer.learning_rate, config.model.width) == (0.05, 12)
    _, config = trained(monkeypatch, "--from-sweep", folder)
    assert (config.schedule.epochs, config.schedule.seed) == (samples.EPOCHS, 0)


def test_another_preset_or_optimizer_brings_its_own(tmp_path: Path, monkeypatch):
    chosen = {
        "transforms.blur": 0.5,
        "transforms.flip": 0.25,
        "optimizer.learning_rate": 0.05,
    }
    folder = write_winner(tmp_path, chosen)
    _, config = trained(
        monkeypatch, "--from-sweep", folder, "--augmentation", "strong", "--blur", "0.75"
    )
    strong = TrainConfig(data="data/faces").transforms.with_preset("strong")
    assert config.transforms.flip == 0.5 and config.transforms.blur == 0.75
    assert config.transforms.mixup == strong.mixup and config.optimizer.learning_rate == 0.05
    _, config = trained(monkeypatch, "--from-sweep", folder, "--optimizer", "adamw")
    assert config.optimizer.learning_rate == 0.001 and config.transforms.flip == 0.25
    _, config = trained(
        monkeypatch, "--from-sweep", folder, "--optimizer", "adamw", "--learning-rate", "0.01"
    )
    assert config.optimizer.learning_rate == 0.01


def test_without_a_sweep_nothing_changes(monkeypatch):
    name, config = trained(monkeypatch)
    assert name is None and config == TrainConfig(data="data/faces")


def test_a_sweep_without_a_winner_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"summary\.json is missing"):
        winner.read(str(tmp_path))
    folder = saved(tmp_path, table({BASE: [None], MINMAX: ["a"], CLAHE: ["b"]}), seeds=[0])
    summary.write(str(folder))
    with pytest.raises(UserError, match="no trial of this sweep has finished"):
        winner.read(str(folder))
    (folder / records.SUMMARY).write_text("[]")
    with pytest.raises(UserError, match="not of a sweep"):
        winner.read(str(folder))


# -- the jobs -------------------------------------------------------------------------------


def job(name: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "jobs" / name), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_the_job_makes_the_report(grid: Path, tmp_path: Path):
    done = job("evaluate.py", "--sweep", str(grid), "--output", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "out" / "report.html")
    assert "no effect shown" not in done.stderr and CLAHE in done.stdout
    assert (tmp_path / "out" / "report.html").exists()


WRONG = {
    "neither": ("evaluate.py", [], "exactly one of --predictions and --sweep"),
    "both": ("evaluate.py", ["--sweep", "x", "--predictions", "y"], "exactly one"),
    "no sweep": ("evaluate.py", ["--sweep", "absent"], "not a sweep: sweep.json is missing"),
    "data too": ("evaluate.py", ["--sweep", "x", "--data", "y"], "go with --predictions"),
    "no summary": (
        "train.py",
        ["--data", "x", "--from-sweep", "absent"],
        "summary.json is missing",
    ),
}


@pytest.mark.parametrize("case", WRONG, ids=list(WRONG))
def test_mistakes_end_in_one_line_and_status_2(case: str, tmp_path: Path):
    name, arguments, message = WRONG[case]
    done = job(name, *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"{name}: ") and message in line
    assert not list(tmp_path.iterdir())


def test_numbers_in_words():
    assert words.points(0.004) == "+0.4" and words.points(-0.0123) == "−1.2"
    assert words.points(-0.0001) == words.points(0.0001) == "0.0" and words.points(None) == "–"
    assert words.between(-0.002, 0.01) == "−0.2 to 1.0" and words.between(None, None) == "–"
    assert words.of_p(0.0004) == "< 0.001" and words.of_p(0.0123) == "0.012"
    assert words.percent(0.5512) == "55.1" and math.isclose(float(words.percent(1.0)), 100)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grid", "search"])
@pytest.mark.parametrize(("width", "theme"), [(1200, []), (500, ["--force-dark-mode"])])
def test_a_browser_draws_the_page(kind: str, request, tmp_path: Path, width: int, theme: list):
    folder = request.getfixturevalue(kind)
    _, page = report.publish(str(folder), str(tmp_path))
    picture = tmp_path / "page.png"
    browse(tmp_path, Path(page), f"--screenshot={picture}", f"--window-size={width},3000", *theme)
    drawn = cv2.imread(str(picture))
    assert drawn.shape[1] == width
    assert (drawn[0, 0].mean() < 60) == bool(theme)  # the background follows the theme
    different = np.abs(drawn.astype(int) - drawn[0, 0]).sum(axis=2) > 60
    assert (different.any(axis=1).reshape(-1, 300).mean(axis=1)[:5] > 0.2).all()
