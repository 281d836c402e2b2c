"""results/README.md: its queries run, and its columns are the columns."""

from __future__ import annotations

import re
from pathlib import Path

import duckdb
import pandas as pd
import prediction_samples as samples
import pyarrow as pa
import pytest
import sweep_samples
from conftest import ROOT

from fer_ray.data import dataset, history, predictions
from fer_ray.evaluation import report, tables
from fer_ray.evaluation.run import evaluate
from fer_ray.metrics import training_metrics
from fer_ray.sweeps import store, summary

TEXT = (ROOT / "results" / "README.md").read_text()
SQL = re.findall(r"```sql\n(.*?)```", TEXT, re.DOTALL)
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
TRAINED = [f"{split}_{name}" for split in history.SPLITS for name in training_metrics()]
SCHEMAS = {
    "images": dataset.SCHEMA,
    "quarantine": dataset.QUARANTINE_SCHEMA,
    "duplicates": dataset.DUPLICATES_SCHEMA,
    "predictions": predictions.schema(["<label>"]),
    **tables.schemas(),
    "history": history.schema(TRAINED),
    "trials": store.schema(TRAINED),
}
SWEEPS = ("normalization", "search")
TYPES = {"float": "float32", "double": "float64"}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """A folder with the ``results/`` that the examples speak of."""
    root = tmp_path_factory.mktemp("project")
    path = root / "results" / "predictions"
    for seed, name, skill in ((1, "custom_cnn", 2.5), (2, "sequential_cnn", 1.0)):
        for split, failed in (("validation", [7]), ("test", [])):
            settings = {"skill": skill, "run": name, "split": split, "failed": failed}
            samples.save(path, samples.random_table(seed, 300, **settings))
        seen = samples.random_table(9, 40, skill=2.0, run=name, split="train")
        samples.save(path, seen)
        samples.save_history(root / "results" / "runs", name)
    result = evaluate([str(path)], resamples=200)
    report.publish(result, str(root / "results" / "evaluation"))
    sweep_samples.normalization(root / "results" / "sweeps" / "normalization")
    sweep_samples.search(root / "results" / "sweeps" / "search")
    for name in SWEEPS:
        summary.write(str(root / "results" / "sweeps" / name))
    return root


def query(text: str) -> pd.DataFrame:
    with duckdb.connect() as connection:
        return connection.sql(text.strip().rstrip(";")).df()


@pytest.mark.parametrize("block", SQL, ids=range(len(SQL)))
def test_sql_runs_and_finds_rows(results: Path, monkeypatch, block: str):
    monkeypatch.chdir(results)
    assert len(query(block)) > 0


@pytest.mark.parametrize("block", PYTHON, ids=range(len(PYTHON)))
def test_python_runs(results: Path, monkeypatch, capsys, block: str):
    monkeypatch.chdir(results)
    exec(compile(block, "results/README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_there_is_something_to_run():
    assert len(SQL) >= 5 and len(PYTHON) >= 2


def test_accuracy_query_agrees_with_the_metrics(results: Path, monkeypatch):
    monkeypatch.chdir(results)
    block = next(block for block in SQL if "count(error) AS errors" in block)
    found = query(block).set_index(["split", "run"]).sort_index()
    metrics = pd.read_parquet("results/evaluation/metrics.parquet")
    metrics = metrics.set_index(["split", "run"]).sort_index()
    assert found["scored"].tolist() == metrics["num_scored"].tolist()
    assert found["errors"].tolist() == metrics["num_errors"].tolist()
    assert found["accuracy"].tolist() == pytest.approx(
        (100 * metrics["accuracy"]).tolist(), abs=0.051
    )


def test_images_that_every_run_gets_wrong(results: Path, monkeypatch):
    monkeypatch.chdir(results)
    block = next(block for block in SQL if "bool_or(correct)" in block)
    frames = [
        pd.read_parquet(f"results/predictions/{run}/validation").set_index("image_id")["correct"]
        for run in ("custom_cnn", "sequential_cnn")
    ]
    both = pd.concat(frames, axis=1).dropna()
    expected = both.index[~both.astype(bool).any(axis=1)]
    assert query(block)["image_id"].tolist() == sorted(expected)


def test_the_query_without_duplicates_leaves_exactly_the_duplicates_out(results: Path, monkeypatch):
    monkeypatch.chdir(results)
    block = next(block for block in SQL if "ANTI JOIN" in block)
    found = query(block).set_index("run")["scored"]
    train = pd.read_parquet("results/predictions/custom_cnn/train")["pixel_sha256"]
    for run in ("custom_cnn", "sequential_cnn"):
        judged = pd.read_parquet(f"results/predictions/{run}/validation")
        duplicates = judged["pixel_sha256"].isin(train)
        assert found[run] == judged["correct"][~duplicates].notna().sum()
        assert found[run] > 0 and duplicates.any()


def test_the_sweep_queries_agree_with_the_summary(results: Path, monkeypatch):
    monkeypatch.chdir(results)
    summarized = summary.summarize("results/sweeps/normalization")
    means = query(next(block for block in SQL if "AS std" in block)).set_index("arm")
    differences = query(next(block for block in SQL if "item.accuracy" in block)).set_index("arm")
    assert len(means) == len(summarized["arms"]) == len(differences) + 1
    for arm in summarized["arms"]:
        assert means["accuracy"][arm["arm"]] == pytest.approx(
            100 * arm["accuracy"]["mean"], abs=0.051
        )
        assert means["seeds"][arm["arm"]] == 3
    for arm in summarized["arms"][1:]:
        points = differences["points"][arm["arm"]]
        assert points == pytest.approx(100 * arm["accuracy"]["difference"], abs=0.051)
    costs = query(next(block for block in SQL if "example_reason" in block))
    counts = costs[costs["sweep"] == "search"].set_index("status")["trials"].to_dict()
    found = summary.summarize("results/sweeps/search")["trials"]
    assert counts == {status: found[status] for status in counts} and found["failed"] == 1


def test_documented_fields_of_the_summary_are_the_fields(results: Path):
    section = re.search(r"\n### summary\n(.*?)(?=\n### |\Z)", TEXT, re.DOTALL)
    assert section
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \| (.*) \|$", section.group(1), re.MULTILINE)
    kinds = {name: kind.strip() for name, kind, _ in rows}
    meanings = {name: meaning for name, _, meaning in rows}
    types = {"number": (int, float), "string": str, "list": list, "object": dict}
    found: dict[str, object] = {}
    for name in SWEEPS:
        found |= summary.summarize(str(results / "results" / "sweeps" / name))
    assert set(found) == set(kinds)
    for name, value in found.items():
        assert isinstance(value, types[kinds[name]]), name
    arms, comparison = found["arms"], found["comparison"]
    assert isinstance(arms, list) and isinstance(comparison, dict)
    documented = set(re.findall(r"`([^`]+)`", meanings["arms"]))
    assert documented == {*arms[1], *arms[1]["accuracy"]}
    documented = set(re.findall(r"`([^`]+)`", meanings["comparison"]))
    assert documented == {*comparison, *comparison["accuracy"]}


@pytest.mark.parametrize("name", SCHEMAS)
def test_documented_columns_are_the_columns(name: str):
    section = re.search(rf"\n### {name}\n(.*?)(?=\n### |\Z)", TEXT, re.DOTALL)
    assert section, name
    documented = re.findall(r"^\| `([^`]+)` \| ([^|]+) \|", section.group(1), re.MULTILINE)
    schema: pa.Schema = SCHEMAS[name]
    columns = [(field.name, TYPES.get(str(field.type), str(field.type))) for field in schema]
    assert [(column, kind.strip()) for column, kind in documented] == columns
