"""A new type of source is one module: it needs no change anywhere else in the project."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from fer_ray.data import image_source
from fer_ray.errors import UserError

ROOT = Path(__file__).resolve().parents[1]

TOY = '''
"""Images in a text file: one line each with split, label and grey tone."""

import numpy as np

from fer_ray import storage
from fer_ray.data.image_source import SOURCES, SourceType
from fer_ray.data.sources import Entry, ReadError


class ToySource:
    has_splits = True

    def __init__(self, path):
        self.path = path

    def entries(self):
        for number, line in enumerate(storage.read_bytes(self.path).decode().splitlines()):
            split, label, tone = line.split()
            yield Entry(path=str(number), split=split, label=label, at=tone.encode())

    def grey(self, path, at):
        if at == b"none":
            raise ReadError("it has no tone")
        return np.full((16, 16), int(at), np.uint8)

    def describe(self, listing):
        return {"num_lines": len(list(listing))}


SOURCES.register("toy")(
    SourceType(
        description="a .toy of tones",
        recognizes=lambda source: source.endswith(".toy"),
        open=lambda source, options: ToySource(storage.absolute(source)),
    )
)
'''


@pytest.fixture
def job(tmp_path):
    """Runs jobs/prepare.py in a process of its own that has the toy source as a plugin."""
    (tmp_path / "toy_source.py").write_text(TOY)
    environment = {**os.environ, "FER_RAY_PLUGINS": "toy_source"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(ROOT)])

    def run(*arguments: object) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / "jobs" / "prepare.py"), *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path
        )

    return run


def test_a_source_of_a_plugin_is_prepared_by_the_job_and_its_workers(job, tmp_path):
    lines = ["train happy 10", "train sad 20", "validation sad 30", "train sad none"]
    (tmp_path / "faces.toy").write_text("\n".join(lines))
    done = job("--source", "faces.toy", "--output", "out", "--image-size", 8)
    assert done.returncode == 0, done.stderr
    info = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert info["source"] == {"kind": "toy", "num_lines": 4}
    rows = pd.concat(pd.read_parquet(tmp_path / "out" / name) for name in ("train", "validation"))
    assert {row.image_id: row.image[0] for row in rows.itertuples()} == {"0": 10, "1": 20, "2": 30}
    quarantine = pd.read_parquet(tmp_path / "out" / "quarantine.parquet")
    assert quarantine["reason"].tolist() == ["it has no tone"]


def test_a_source_of_a_plugin_is_in_the_help_and_in_messages(job, tmp_path):
    help_text = " ".join(job("--help").stdout.split())
    assert "a .toy of tones" in help_text
    for name in image_source.SOURCES.names:
        assert image_source.SOURCES[name].description in help_text
    (tmp_path / "notes.txt").write_text("x")
    done = job("--source", "notes.txt", "--output", "out")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "is not a known type of source" in done.stderr and "a .toy of tones" in done.stderr


def test_an_exact_name_comes_before_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "synthetic").mkdir()
    assert image_source.find_type("synthetic") == "synthetic"
    assert image_source.find_type("./synthetic") == "folder"


def test_images_to_predict_are_files_and_not_generated(tmp_path):
    (tmp_path / "faces.csv").write_text("path,label\n")
    with pytest.raises(UserError, match=r"--images: .* expected: a folder .*a \.zip") as caught:
        image_source.open_files(str(tmp_path / "faces.csv"))
    assert "synthetic" not in str(caught.value)


def test_the_registry_alone_loads_no_type_of_source():
    """As in training workers and predicting actors, which import the modules around it."""
    script = (
        "import sys; import fer_ray.data.image_source, fer_ray.runtime.data_tasks\n"
        "print([name for name in sys.modules if name.startswith(('fer_ray.data.sources.', "
        "'fer_ray.data.synthetic', 'fer_ray.preparation', 'duckdb'))])"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "['fer_ray.data.sources.files']"
