"""Scores and comparisons from folders of predictions: by hand, by id, and the job itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import prediction_samples as samples
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import job_module
from conftest import ROOT

from fer_ray import metrics
from fer_ray.errors import UserError
from fer_ray.evaluation import comparisons, report, run, tables

LABELS = ("calm", "tense")
RIGHT, WRONG = [0.9, 0.1], [0.2, 0.8]  # of a calm image


def evaluate(*paths: Path, **settings) -> run.Evaluation:
    return run.evaluate([str(path) for path in paths], **{"resamples": 200} | settings)


def calm_images(correct: list[bool], **settings) -> pa.Table:
    """Predictions of calm images, some of them correct."""
    probabilities = np.array([RIGHT if is_correct else WRONG for is_correct in correct])
    return samples.table(["calm"] * len(correct), probabilities, labels=LABELS, **settings)


def test_scores_by_hand(tmp_path: Path):
    true = ["calm", "calm", "tense", "tense", "tense", None, "calm"]
    rows = np.array([RIGHT, WRONG, RIGHT, WRONG, WRONG, RIGHT, RIGHT])
    samples.save(tmp_path, samples.table(true, rows, labels=LABELS, failed=[6]), LABELS)
    (score,) = evaluate(tmp_path).scores
    assert (score.num_images, score.num_errors, score.num_unlabelled) == (7, 1, 1)
    assert score.num_scored == 5
    assert score.confusion.tolist() == [[1, 1], [1, 2]]
    assert score.accuracy.value == 3 / 5
    assert score.estimates["balanced_accuracy"].value == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert score.estimates["macro_f1"].value == pytest.approx((2 / 4 + 4 / 6) / 2)
    losses = -np.log([0.9, 0.2, 0.1, 0.8, 0.8])
    assert score.nll.value == pytest.approx(losses.mean(), rel=1e-6)
    assert score.accuracy.low < 3 / 5 < score.accuracy.high
    assert score.per_class.support.tolist() == [2, 3]


def test_comparison_by_hand_and_by_id(tmp_path: Path):
    ids = [f"image-{number}" for number in range(10)]
    first = [True] * 6 + [False] * 4
    second = [True] * 2 + [False] * 5 + [True] + [False] * 2
    samples.save(tmp_path, calm_images(first, image_ids=ids, run="a"), LABELS)
    # The second run's rows stand in another order: only the id says which image is which.
    order = np.random.default_rng(0).permutation(10)
    samples.save(tmp_path, calm_images(second, image_ids=ids, run="b").take(order), LABELS)
    (pair,) = evaluate(tmp_path).comparisons
    assert (pair.first_run, pair.second_run) == ("a", "b")
    assert (pair.num_common, pair.only_first_right, pair.only_second_right) == (10, 4, 1)
    assert (pair.first_accuracy, pair.second_accuracy) == pytest.approx((0.6, 0.3))
    assert pair.difference == pytest.approx(0.3)
    assert pair.p_value == pytest.approx(2 * (1 + 5) / 2**5)
    assert pair.p_holm == pair.p_value
    assert pair.difference_low < 0.3 < pair.difference_high


def test_only_common_images_are_compared_and_a_note_says_so(tmp_path: Path):
    ids = [f"image-{number}" for number in range(8)]
    samples.save(tmp_path, calm_images([True] * 6, image_ids=ids[:6], run="a"), LABELS)
    other = calm_images([False] * 6, image_ids=ids[2:], run="b")
    # One has other pixels under its id (the hash is that of its row, two further on).
    hashes = [f"{number:064x}" for number in range(2, 8)]
    hashes[3] = "f" * 64
    other = other.set_column(1, "pixel_sha256", pa.array(hashes))
    samples.save(tmp_path, other, LABELS)
    result = evaluate(tmp_path)
    (pair,) = result.comparisons
    assert (pair.num_first, pair.num_second) == (6, 6)
    assert (pair.num_common, pair.num_conflicting) == (3, 1)
    assert (pair.only_first_right, pair.only_second_right) == (3, 0)
    notes = "\n".join(tables.notes(result))
    assert "compared on the 3 images that both have" in notes
    assert "1 image has the same image_id but different labels or pixels" in notes


def test_runs_without_common_images_are_not_compared(tmp_path: Path):
    samples.save(tmp_path, calm_images([True] * 4, image_ids=list("abcd"), run="a"), LABELS)
    samples.save(tmp_path, calm_images([False] * 4, image_ids=list("efgh"), run="b"), LABELS)
    result = evaluate(tmp_path)
    assert "no labelled image in common" in tables.as_text(result)
    tables.write(result, str(tmp_path))
    row = pq.read_table(tmp_path / "comparisons.parquet").to_pylist()[0]
    assert row["num_common"] == 0 and row["difference"] is None and row["p_holm"] is None


def test_every_pair_is_corrected_together_and_a_baseline_alone(tmp_path: Path):
    for name, skill in (("strong", 3.0), ("middle", 1.0), ("weak", 0.9)):
        rows = samples.random_table(len(name), 300, skill=skill, run=name)
        samples.save(tmp_path, rows)
    every = evaluate(tmp_path).comparisons
    pairs = {(pair.first_run, pair.second_run) for pair in every}
    assert {frozenset(pair) for pair in pairs} == {
        frozenset(pair) for pair in (("strong", "middle"), ("strong", "weak"), ("middle", "weak"))
    }
    assert [pair.p_holm for pair in every] == metrics.holm([pair.p_value for pair in every])
    assert any(pair.p_holm > pair.p_value for pair in every)
    against = evaluate(tmp_path, baseline="weak").comparisons
    assert sorted((pair.first_run, pair.second_run) for pair in against) == [
        ("middle", "weak"),
        ("strong", "weak"),
    ]


def test_splits_are_not_mixed(tmp_path: Path):
    samples.save(tmp_path, samples.random_table(1, 30, run="a"))
    samples.save(tmp_path, samples.random_table(1, 40, run="a", split="test"))
    samples.save(tmp_path, samples.random_table(2, 40, run="b", split="test"))
    result = evaluate(tmp_path)
    assert [(score.split, score.run, score.num_scored) for score in result.scores] == [
        ("test", "a", 40),
        ("test", "b", 40),
        ("validation", "a", 30),
    ]
    assert [pair.split for pair in result.comparisons] == ["test"]


def test_the_same_run_and_split_twice_is_refused(tmp_path: Path):
    one = samples.save(tmp_path / "x", samples.random_table(1, 4))
    samples.save(tmp_path / "y", samples.random_table(1, 4))
    with pytest.raises(UserError, match="is in two folders") as caught:
        evaluate(tmp_path / "x", tmp_path / "y")
    assert str(one) in str(caught.value)
    assert len(evaluate(tmp_path / "x", one).scores) == 1


def test_runs_of_other_classes_are_not_compared(tmp_path: Path):
    samples.save(tmp_path, samples.random_table(1, 9, run="a", labels=LABELS), LABELS)
    others = ("calm", "glad")
    samples.save(tmp_path, samples.random_table(1, 9, run="b", labels=others), others)
    with pytest.raises(UserError, match="cannot be compared"):
        evaluate(tmp_path)


def test_classes_in_another_order_are_the_same(tmp_path: Path):
    samples.save(tmp_path, samples.random_table(1, 50, run="a", labels=LABELS), LABELS)
    reordered = samples.random_table(1, 50, run="b", labels=LABELS)
    columns = reordered.column_names
    spot = columns.index("prob_calm")
    columns[spot : spot + 2] = ["prob_tense", "prob_calm"]
    samples.save(tmp_path, reordered.select(columns), LABELS[::-1])
    result = evaluate(tmp_path)
    first, second = result.scores
    assert first.nll == second.nll
    assert (first.confusion == second.confusion[::-1, ::-1]).all()
    assert result.comparisons[0].difference == 0


def test_a_label_that_the_model_does_not_know_is_refused(tmp_path: Path):
    rows = samples.table(["calm", "bored"], np.array([RIGHT, RIGHT]), labels=LABELS)
    samples.save(tmp_path, rows, LABELS)
    with pytest.raises(UserError, match="'bored' is not one of the model's labels calm, tense"):
        evaluate(tmp_path)


def test_without_labels_there_are_rows_but_no_metrics(tmp_path: Path):
    rows = samples.table([None, None], np.array([RIGHT, WRONG]), labels=LABELS)
    samples.save(tmp_path, rows, LABELS)
    result = evaluate(tmp_path)
    tables.write(result, str(tmp_path))
    row = pq.read_table(tmp_path / "metrics.parquet").to_pylist()[0]
    assert row["num_unlabelled"] == 2 and row["num_scored"] == 0
    assert row["accuracy"] is None and row["nll_high"] is None
    assert "2 of 2 images have no label" in tables.as_text(result)


@pytest.mark.parametrize(
    ("difference", "p_value", "expected"),
    [
        (0.031, 0.0001, "a is 3.1 points more accurate than b (95 % interval 2.0 to 4.2, p < 0."),
        (-0.031, 0.01, "b is 3.1 points more accurate than a (95 % interval -4.2 to -2.0, p = 0."),
        (0.031, 0.2, "No difference shown: a is 3.1 points above b (95 % interval"),
        (0.0, 1.0, "No difference shown: a and b are equally accurate (95 % interval"),
    ],
)
def test_comparisons_in_words(difference: float, p_value: float, expected: str):
    counts = dict.fromkeys(
        ["num_first", "num_second", "num_common", "only_first_right", "only_second_right"], 3589
    )
    pair = comparisons.Comparison(
        split="test",
        first_run="a",
        second_run="b",
        num_conflicting=0,
        first_accuracy=0.5,
        second_accuracy=0.5,
        difference=difference,
        difference_low=0.020,
        difference_high=0.042,
        p_value=p_value,
        p_holm=p_value,
        **counts,
    )
    words = tables.in_words(pair)
    assert words.startswith(expected)
    assert words.endswith("n = 3,589).")


def test_tables_have_their_schemas_and_agree(tmp_path: Path):
    samples.save(tmp_path / "p", samples.random_table(1, 60, run="a", failed=[1]))
    samples.save(tmp_path / "p", samples.random_table(2, 60, run="b"))
    tables.write(evaluate(tmp_path / "p"), str(tmp_path))
    for name, schema in tables.schemas().items():
        assert pq.read_schema(tmp_path / f"{name}.parquet").equals(schema)
    scored = pd.read_parquet(tmp_path / "metrics.parquet").set_index("run")["num_scored"]
    counted = duckdb.sql(
        f"SELECT run, sum(count), sum(count) FILTER (label = predicted) / sum(count) "
        f"FROM '{tmp_path}/confusion.parquet' GROUP BY run ORDER BY run"
    ).fetchall()
    accuracy = pd.read_parquet(tmp_path / "metrics.parquet")["accuracy"]
    assert [row[1] for row in counted] == scored.tolist() == [59, 60]
    assert [row[2] for row in counted] == pytest.approx(accuracy.tolist())
    classes = pd.read_parquet(tmp_path / "per_class.parquet")
    assert classes.groupby("run")["support"].sum().tolist() == [59, 60]


def test_an_evaluation_replaces_an_earlier_one_and_nothing_else(tmp_path: Path):
    samples.save(tmp_path / "p", samples.random_table(1, 12))
    result, output = evaluate(tmp_path / "p"), tmp_path / "out"
    report.publish(result, str(output))
    (output / "metrics.parquet").write_text("damaged")
    report.publish(result, str(output))
    assert pq.read_table(output / "metrics.parquet").num_rows == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "p"]

    (output / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"it holds 'notes\.txt'"):
        report.publish(result, str(output))
    for taken in (tmp_path / "p", tmp_path / "p" / "one" / "validation"):
        with pytest.raises(UserError, match="not an evaluation"):
            report.publish(result, str(taken))
    assert (output / "notes.txt").read_text() == "mine"


def run_job(*flags: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "jobs" / "evaluate.py"), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_the_job_prints_the_comparison_and_the_report(tmp_path: Path):
    samples.save(tmp_path / "p", samples.random_table(1, 400, skill=3, run="custom_cnn"))
    samples.save(tmp_path / "p", samples.random_table(2, 400, skill=1, run="sequential_cnn"))
    done = run_job(
        "--predictions", tmp_path / "p", "--output", tmp_path / "out", "--bootstrap", 200
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == str(tmp_path / "out" / "report.html")
    assert Path(lines[-1]).exists()
    row = pd.read_parquet(tmp_path / "out" / "metrics.parquet").iloc[0]
    shown = f"{100 * row.accuracy:.1f} ({100 * row.accuracy_low:.1f} to "
    assert shown in next(line for line in lines if line.startswith("custom_cnn "))
    assert any(line.startswith("custom_cnn is ") and "p < 0.001" in line for line in lines)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--predictions", "absent"], "absent: no such folder"),
        (["--predictions", "."], "no predictions here"),
        (["--predictions", "p", "--baseline", "tow"], "--baseline: 'tow' is not one of one"),
        (["--predictions", "p", "--runs", "absent"], "--runs: absent: no such folder"),
        (["--predictions", "p", "--data", "p"], "is not a prepared dataset"),
        (["--predictions", "p", "--output", "p"], "--output:"),
        (["--predictions", "p", "--bootstrap", "1"], "--bootstrap"),
        (["--prediction", "p"], "--predictions"),
    ],
)
def test_user_errors_end_in_one_line(tmp_path: Path, monkeypatch, capsys, flags, expected):
    from fer_ray import cli

    samples.save(tmp_path / "p", samples.random_table(1, 4))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path if flags[1] != "." else tmp_path / "empty")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        cli.run(job_module("evaluate").main)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert expected in error and error.count("\n") == 1
    assert not (tmp_path / "results").exists()
