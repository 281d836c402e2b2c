"""Files of runs, sweeps and predictions that somebody else wrote, or that a crash left."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import prediction_samples as samples
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rewriting
import small
import torch

from fer_ray.config.schema import TrainConfig
from fer_ray.data import history, predictions
from fer_ray.data.dataset import read_info
from fer_ray.data.run_folder import RunFolder
from fer_ray.errors import UserError
from fer_ray.inference import plan as planning
from fer_ray.inference.predictor import Predictor
from fer_ray.models import checkpoint
from fer_ray.sweeps.store import SweepFolder, Trial
from fer_ray.training import run as training
from fer_ray.training import worker

NO_OBJECTS = rewriting.NO_JSON_OBJECTS
FILES = {
    "config.json": lambda folder: folder.config,
    "run.json": lambda folder: folder.best_checkpoint,
    "failure.json": lambda folder: folder.failure,
    "row_groups.json": lambda folder: folder.row_groups,
    "placement_group.json": lambda folder: folder.placement_group,
}


def one_line(read, path: Path, message: str | None = None) -> None:
    """Reading ends in one line that names the file."""
    with pytest.raises(UserError, match=message) as caught:
        read()
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", NO_OBJECTS.values(), ids=NO_OBJECTS)
@pytest.mark.parametrize("name", FILES)
def test_a_file_of_a_run_that_is_no_json_object_is_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    if name == "row_groups.json" and content == b"{}":
        assert RunFolder(str(tmp_path)).row_groups == {}
    else:
        one_line(lambda: FILES[name](RunFolder(str(tmp_path))), tmp_path / name)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("config.json", {"config": [], "data_sha256": "", "loading": "memory"}, r"config is \[\]"),
        ("config.json", {"config": {}, "data_sha256": 1, "loading": "memory"}, "data_sha256 is 1"),
        ("run.json", {"best_checkpoint": "a/b", "checkpoint_sha256": ""}, "not a plain name"),
        ("failure.json", {"reason": ["x"]}, "reason is"),
        ("row_groups.json", {"train": 800}, "train is 800, not a list"),
        ("placement_group.json", {"id": "../../x"}, "id is '../../x', not hexadecimal"),
    ],
)
def test_a_value_of_the_wrong_type_is_one_line(tmp_path, name, value, message):
    (tmp_path / name).write_text(json.dumps(value))
    one_line(lambda: FILES[name](RunFolder(str(tmp_path))), tmp_path / name, message)


def test_a_pipe_in_the_place_of_a_runs_file_blocks_nobody(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    one_line(lambda: RunFolder(str(tmp_path)).config, tmp_path, "is a pipe or a device")
    os.mkfifo(tmp_path / "history.parquet")
    one_line(RunFolder(str(tmp_path)).read_history, tmp_path, "is a pipe or a device")


@pytest.mark.parametrize("content", [b"", b"PAR1PAR1", b"no parquet", b"PAR1" + b"\xff" * 99])
def test_a_history_that_is_no_parquet_is_one_line(tmp_path, content):
    path = tmp_path / "history.parquet"
    path.write_bytes(content)
    one_line(lambda: history.read_history(str(path)), path, "cannot be read as Parquet")


def test_removing_checkpoints_leaves_everything_outside_the_run_alone(tmp_path):
    """Neither an index of Ray Train from elsewhere nor a link leads out of the run's folder."""
    victim = tmp_path / "victim"
    (victim / "deep").mkdir(parents=True)
    (victim / "deep" / "file").write_text("kept")
    run = tmp_path / "run"
    (run / "checkpoint_000001").mkdir(parents=True)
    snapshot = {"checkpoint_results": [{"checkpoint_dir_name": "../victim"}]}
    (run / "checkpoint_manager_snapshot.json").write_text(json.dumps(snapshot))
    (run / "checkpoint_000002").symlink_to(victim)
    RunFolder(str(run)).remove_checkpoints()
    assert (victim / "deep" / "file").read_text() == "kept"
    assert not list(run.iterdir())


def test_a_run_with_a_checkpoint_of_other_settings_is_not_resumed(drawn_faces, tmp_path):
    info = read_info(drawn_faces)
    values = small.config(schedule={"global_batch_size": 32}).to_dict() | {"data": drawn_faces}
    config = TrainConfig.from_dict(values)
    first = training.plan(config, storage_path=str(tmp_path), run="tried")
    first.files.write_config(first.config.to_dict(), data_sha256=info.data_sha256, loading="memory")
    path = small.write_checkpoint(info, tmp_path / "tried" / "checkpoint_000000")
    with pytest.raises(UserError, match=rf"^{path} was trained with other settings .*--run$"):
        training.plan(first.config, storage_path=str(tmp_path), run="tried")
    resumed = checkpoint.read(str(path))
    with worker._recording_failure(first.files, rank=0):  # a retry would end in the same way
        resumed.check_config(first.config)
    assert "was trained with other settings" in (first.files.failure or "")
    rewriting.hash_again(path / "checkpoint.json", config=first.config.to_dict())
    assert training.plan(first.config, storage_path=str(tmp_path), run="tried").resumes


@pytest.mark.parametrize("content", NO_OBJECTS.values(), ids=NO_OBJECTS)
def test_a_sweeps_file_that_is_no_json_object_is_one_line(tmp_path, content):
    sweep = SweepFolder(str(tmp_path))
    sweep.create(Trial(number=0, arm=None, options={}))
    trial = Path(sweep.trial(0).path) / "trial.json"
    for path, read in ((tmp_path / "sweep.json", sweep.read_settings), (trial, sweep.trials)):
        path.write_bytes(content)
        one_line(read, path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"number": 7}, "number is 7"),
        ({"number": "../../x"}, "number is '../../x'"),
        ({"arm": 1}, "arm is 1"),
        ({"options": []}, "options is"),
    ],
)
def test_a_trial_of_wrong_values_is_one_line(tmp_path, changes, message):
    sweep = SweepFolder(str(tmp_path))
    sweep.create(Trial(number=0, arm=None, options={}))
    path = Path(sweep.trial(0).path) / "trial.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    one_line(sweep.trials, path, message)


def test_a_sweeps_table_that_is_no_parquet_is_one_line(tmp_path):
    (tmp_path / "trials.parquet").write_bytes(b"PAR1")
    one_line(SweepFolder(str(tmp_path)).read_table, tmp_path, "cannot be read as Parquet")


@pytest.fixture
def folder(tmp_path) -> Path:
    return samples.save(tmp_path, samples.random_table(1, 20, failed=[3]))


@pytest.mark.parametrize("content", NO_OBJECTS.values(), ids=NO_OBJECTS)
def test_a_manifest_that_is_no_json_object_is_one_line(folder, content):
    (folder / predictions.MANIFEST).write_bytes(content)
    one_line(lambda: predictions.read(str(folder)), folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": "20"}, "rows is '20'"),
        ({"labels": [1, 2]}, r"labels is \[1, 2\]"),
        ({"files": ["../../victim.parquet"]}, "not a list of different plain names"),
        ({"files": "part-00000.parquet"}, "files is"),
        ({"run": "../victim"}, r"run is '\.\./victim', not a plain name"),
        ({"split": "a/b"}, "split is 'a/b', not a plain name"),
        ({"checkpoint": None}, "checkpoint is None"),
        ({"config": []}, "config is"),
    ],
)
def test_a_manifest_of_wrong_values_is_one_line(folder, changes, message):
    path = folder / predictions.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    one_line(lambda: predictions.read(str(folder)), folder, message)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.25, 1.5, None])
@pytest.mark.parametrize("column", ["prob_sad", "confidence"])
def test_probabilities_that_are_none_are_not_evaluated(folder, column, value):
    path = folder / "part-00000.parquet"
    table = pq.ParquetFile(path).read()
    values = table[column].to_pylist()
    values[0] = value
    field = table.schema.field(column)
    index = table.schema.get_field_index(column)
    pq.write_table(table.set_column(index, field, pa.array(values, field.type)), path)
    message = f"{column} is no number between 0 and 1 in 1 rows"
    one_line(lambda: predictions.read(str(folder)), folder, message)


@pytest.mark.parametrize("value", [float("nan"), -0.5])
def test_probabilities_that_are_none_are_not_predicted(drawn_faces, tmp_path, monkeypatch, value):
    """Such as of finite weights whose sums are not."""
    path = small.write_checkpoint(read_info(drawn_faces), tmp_path / "checkpoint")
    settings = {"path": str(path), "row": {}, "source": None, "data": None, "staging": ""}
    predictor = Predictor(**settings, device=torch.device("cpu"), batch_size=256)
    forward = SimpleNamespace(probabilities=lambda model, images: torch.full((2, 7), value))
    monkeypatch.setattr(checkpoint.Checkpoint, "forward", lambda saved, device: forward)
    with pytest.raises(UserError, match=f"^{path}: the network gives probabilities that are no"):
        predictor._probabilities(np.zeros((2, 48, 48), np.uint8))


def test_a_fallback_is_an_argument_of_the_plan(drawn_faces, tmp_path):
    for name in ("checkpoint_1", "checkpoint_2"):
        small.write_checkpoint(read_info(drawn_faces), tmp_path / "run" / name)
    (tmp_path / "run" / "checkpoint_2" / "checkpoint.json").write_text("{")
    settings = {"checkpoint_path": str(tmp_path / "run"), "data": drawn_faces}
    settings |= {"split": "validation", "output": str(tmp_path / "predictions")}
    with pytest.raises(UserError, match="--allow-fallback"):
        planning.plan(**settings)
    lines: list[str] = []
    plan = planning.plan(**settings, allow_fallback=True, log=lines.append)
    assert plan.checkpoint.path.endswith("checkpoint_1") and "using checkpoint_1" in lines[0]
