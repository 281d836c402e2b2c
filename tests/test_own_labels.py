"""A data set with labels of one's own goes through every job unchanged."""

from __future__ import annotations

import io
import runpy
import sys
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
LABELS = ("contempt", "no face", "Ärger")
"""In the order of their code points; a blank and an umlaut are names like any others."""


def write_bands(root: Path, count: int) -> None:
    """Class folders without splits, colour JPEGs: each class has its bright band."""
    draw = np.random.default_rng(0)
    for number, label in enumerate(LABELS):
        (root / label).mkdir(parents=True)
        for index in range(count):
            pixels = draw.integers(0, 90, (40, 30, 3), dtype=np.uint8)
            pixels[4 + 12 * number : 12 + 12 * number] += 150
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "JPEG")
            (root / label / f"{index}.JPG").write_bytes(buffer.getvalue())


@pytest.fixture
def job(ray_cluster, tmp_path, monkeypatch, capsys):
    """Runs a job's `main` here, on the shared cluster; gives what it prints."""

    def run(name: str, *flags: str) -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags])
        runpy.run_path(str(ROOT / "jobs" / f"{name}.py"))["main"]()
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    return run


@pytest.mark.slow
def test_three_labels_are_prepared_trained_predicted_and_evaluated(job, tmp_path):
    write_bands(tmp_path / "faces", 60)
    output = job("prepare", "--source", "faces", "--output", "data", "--image-size", "24")
    assert "Ärger" in output and "no face" in output
    small = ["--width", "4", "--epochs", "4", "--global-batch-size", "16", "--num-workers", "1"]
    job("train", "--data", "data", "--model", "custom_cnn", *small)
    job("predict", "--checkpoint", "results/runs/custom_cnn", "--data", "data")
    output = job("evaluate", "--predictions", "results/predictions", "--data", "data")

    found = pd.read_parquet(tmp_path / "results/predictions/custom_cnn/validation")
    assert [name for name in found if name.startswith("prob_")] == [f"prob_{x}" for x in LABELS]
    assert len(found) == 18 and set(found["label"]) == set(LABELS)
    assert found[[f"prob_{label}" for label in LABELS]].sum(axis=1).to_numpy() == pytest.approx(1)
    metrics = pd.read_parquet(tmp_path / "results/evaluation/metrics.parquet")
    assert metrics["accuracy"].item() == pytest.approx(found["correct"].mean())
    assert metrics["accuracy"].item() > 0.6  # three bands are easy; chance is a third
    classes = pd.read_parquet(tmp_path / "results/evaluation/per_class.parquet")
    assert tuple(classes["label"]) == LABELS
    page = (tmp_path / "results/evaluation/report.html").read_text()
    assert all(label in page for label in LABELS)
    query = """SELECT count(*) FROM 'results/predictions/*/*/*.parquet' WHERE "prob_Ärger" > 0.5"""
    query = query.replace("results", str(tmp_path / "results"))
    assert duckdb.sql(query).fetchall() == [((found["prob_Ärger"] > 0.5).sum(),)]
