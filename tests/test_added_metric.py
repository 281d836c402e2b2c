"""A metric that code outside the package adds is in every file, line and page by itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import prediction_samples as samples
import pyarrow.parquet as pq
import pytest
import small
from conftest import ROOT
from test_loop import fit, trainer

from fer_ray import metrics
from fer_ray.data import history
from fer_ray.evaluation import report, tables
from fer_ray.evaluation.run import evaluate
from fer_ray.registry import PLUGINS, load_plugins
from fer_ray.sweeps import store
from fer_ray.training import worker

PLUGIN = '''
from fer_ray import metrics

@metrics.register("kappa", title="Cohen's kappa", unit="", bounds=(-1.0, 1.0))
def kappa(confusion):
    """Agreement beyond chance."""
    total = confusion.sum(axis=(-2, -1))
    by_chance = (confusion.sum(axis=-1) * confusion.sum(axis=-2)).sum(axis=-1) / total**2
    return (metrics.accuracy(confusion) - by_chance) / (1 - by_chance)
'''


@pytest.fixture
def kappa(tmp_path, monkeypatch) -> metrics.Metric:
    """Cohen's kappa from a plugin; the registry is left as it was."""
    (tmp_path / "toy_metrics.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(PLUGINS, "toy_metrics")
    load_plugins()
    yield metrics.METRICS["kappa"]
    metrics.METRICS.unregister("kappa")
    sys.modules.pop("toy_metrics")


def test_its_value_by_hand(kappa):
    # observed agreement (20 + 15) / 50 = 0.7, by chance (25 * 30 + 25 * 20) / 50**2 = 0.5
    assert kappa.value([[20, 5], [10, 15]]) == pytest.approx(0.4)
    low, high = metrics.bootstrap_interval([[20, 5], [10, 15]], "kappa")
    assert -1 <= low < 0.4 < high <= 1


def test_it_is_in_the_history_and_the_progress_of_a_training(kappa, tmp_path):
    trained = trainer(small.config())
    fit(trained)
    path = str(tmp_path / "history.parquet")
    history.write_history(path, trained.history)
    table = history.read_history(path)
    assert table.column_names == [*history.SCHEMA.names, "train_kappa", "validation_kappa"]
    values = table["validation_kappa"].to_pylist()
    assert values == [row["validation_kappa"] for row in trained.history]
    line = worker._values(trained.history[-1], "validation")
    assert line.endswith(f"%, Cohen's kappa {values[-1]:.4f}")


def test_epochs_from_before_it_was_registered_are_null(kappa, tmp_path):
    new = trainer(small.config(schedule={"epochs": 1}))
    fit(new)
    old = {name: value for name, value in new.history[0].items() if "kappa" not in name}
    path = str(tmp_path / "history.parquet")
    history.write_history(path, [old, {**new.history[0], "epoch": 2}])
    first, second = history.read_history(path)["train_kappa"].to_pylist()
    assert first is None and second == new.history[0]["train_kappa"]


def test_it_is_in_the_trials_of_a_sweep(kappa, tmp_path):
    config = small.config()
    trained = trainer(config)
    fit(trained)
    sweep = store.SweepFolder(str(tmp_path / "sweep"))
    for number in (0, 1):
        sweep.create(store.Trial(number=number, arm=None, options={}))
    sweep.trial(1).files.write_history(trained.history)
    sweep.write_table(config)
    table = pq.read_table(tmp_path / "sweep" / store.TRIALS)
    assert table.column_names == [*store.schema().names, "train_kappa", "validation_kappa"]
    assert table["train_kappa"].to_pylist() == [row["train_kappa"] for row in trained.history]


def test_it_is_in_the_tables_the_text_and_the_page_of_an_evaluation(kappa, tmp_path):
    samples.save(tmp_path / "p", samples.random_table(1, 90, run="toy"))
    samples.save(tmp_path / "p", samples.random_table(2, 90, run="other"))
    history_of_toy = trainer(small.config())
    fit(history_of_toy)
    (tmp_path / "runs" / "toy").mkdir(parents=True)
    history.write_history(str(tmp_path / "runs/toy/history.parquet"), history_of_toy.history)
    samples.save_history(tmp_path / "runs", "other")  # without the metric
    result = evaluate([str(tmp_path / "p")], resamples=200)
    page = Path(report.publish(result, str(tmp_path / "out"), runs=str(tmp_path / "runs")))

    table = pq.read_table(tmp_path / "out" / "metrics.parquet")
    assert table.column_names[-4:] == ["nll_high", "kappa", "kappa_low", "kappa_high"]
    row = table.to_pylist()[1]
    assert row["kappa_low"] < row["kappa"] < row["kappa_high"]
    cell = f"{row['kappa']:.3f} ({row['kappa_low']:.3f} to {row['kappa_high']:.3f})"
    assert "Cohen's kappa" in tables.as_text(result) and cell in tables.as_text(result)
    text = page.read_text().replace("&#39;", "'")
    assert '<th scope="col">Cohen' in text
    assert f"{row['kappa_low']:.3f} to {row['kappa_high']:.3f}" in text
    assert "Cohen's kappa: agreement beyond chance." in text
    assert text.count("Learning curves, Cohen's kappa") == 1


@pytest.mark.parametrize(
    ("name", "settings", "function", "reason"),
    [
        ("loss", {}, metrics.accuracy, "not usable as the name of a column"),
        ("top 2", {}, metrics.accuracy, "not usable as the name of a column"),
        ("accuracy", {}, metrics.macro_f1, "registered twice"),
        ("total", {}, lambda confusion: confusion.sum() / 171.0, r"values of shape \(\)"),
        ("images", {}, lambda confusion: confusion.sum(axis=(-2, -1)), "are not in 0.0 to 1.0"),
    ],
)
def test_what_is_no_metric_is_refused(name, settings, function, reason):
    with pytest.raises(ValueError, match=reason):
        metrics.register(name, title=name, **settings)(function)
    assert metrics.METRICS.names == ("accuracy", "macro_f1", "balanced_accuracy")


@pytest.mark.slow
def test_it_is_in_what_the_jobs_write(drawn_faces, tmp_path):
    (tmp_path / "toy_metrics.py").write_text(PLUGIN)
    (tmp_path / "toy.toml").write_text("space.transforms.normalization = ['none']")
    environment = {**os.environ, PLUGINS: "toy_metrics"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    small_training = [
        *("--width", "4", "--epochs", "1"),
        *("--global-batch-size", "32"),
        *("--batch-norm-group", "16"),
    ]

    def job(name: str, *flags: str) -> str:
        command = [sys.executable, str(ROOT / "jobs" / name), "--data", drawn_faces, *flags]
        done = subprocess.run(
            [*command, *small_training],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    lines = job("train.py", "--num-workers", "1", "--run", "toy")
    assert "Cohen's kappa" in lines
    run = tmp_path / "results" / "runs" / "toy"
    (value,) = pq.read_table(run / "history.parquet")["validation_kappa"].to_pylist()
    assert f'"validation_kappa": {value}' in (run / "run.json").read_text()
    job("tune.py", "--sweep", "toy.toml", "--seeds", "1")
    trials = pq.read_table(tmp_path / "results" / "sweeps" / "toy" / "trials.parquet")
    assert trials["validation_kappa"].null_count == 0 and trials.num_rows == 1
