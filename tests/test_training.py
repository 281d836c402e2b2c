"""Training on Ray: the fast tests plan, the slow ones fit, kill and resume."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import small
from processes import kill_with_descendants, killing

from fer_ray.config.schema import TrainConfig
from fer_ray.data import history
from fer_ray.data.dataset import read_info
from fer_ray.data.run_folder import RunFolder
from fer_ray.errors import JobFailed, UserError
from fer_ray.models import run_checkpoints
from fer_ray.training import run as training
from fer_ray.training import worker
from fer_ray.training.process_group import ProcessGroup

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def data(drawn_faces):
    return drawn_faces


def config(data: str, **sections) -> TrainConfig:
    values = small.config(**sections).to_dict()
    values["schedule"].setdefault("global_batch_size", 32)
    return TrainConfig.from_dict({**values, "data": data})


def plan(config: TrainConfig, folder: Path, run: str = "tried") -> training.Plan:
    return training.plan(config, storage_path=str(folder), run=run)


def test_a_plan_checks_the_data_set(data, tmp_path):
    with pytest.raises(UserError, match="500 is more than the 320 images of the train split"):
        plan(config(data, schedule={"global_batch_size": 500}), tmp_path)
    with pytest.raises(UserError, match="is not a prepared dataset"):
        plan(config(str(tmp_path / "absent")), tmp_path)
    with pytest.raises(UserError, match="no file at"):
        model = {"name": "efficientnet_b2", "weights": str(tmp_path / "absent.pth")}
        plan(config(data, model=model), tmp_path)
    assert not list(tmp_path.iterdir())


def test_other_settings_under_the_same_name_are_refused_and_shown(data, tmp_path):
    first = plan(config(data), tmp_path)
    assert not first.resumes
    (tmp_path / "tried").mkdir()
    saved = {"config": first.config.to_dict(), "data_sha256": first.info.data_sha256}
    saved["loading"] = "memory"
    (tmp_path / "tried" / "config.json").write_text(json.dumps(saved))
    assert plan(config(data), tmp_path).resumes
    assert plan(config(data, scaling={"num_workers": 2}), tmp_path).resumes
    with pytest.raises(UserError, match=r"schedule\.epochs: 2 -> 3"):
        plan(config(data, schedule={"epochs": 3}), tmp_path)
    saved["data_sha256"] = "other"
    (tmp_path / "tried" / "config.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match="other images"):
        plan(config(data), tmp_path)


def test_what_can_never_be_scheduled_is_refused(data, tmp_path):
    for scaling, message in (
        ({"num_workers": 50}, "50 CPUs requested, the cluster has 2"),
        ({"use_gpu": True}, "1 GPUs requested, the cluster has 0"),
    ):
        schedule = {"global_batch_size": 64, "batch_norm_group": 1}
        wanted = plan(config(data, scaling=scaling, schedule=schedule), tmp_path)
        with pytest.raises(UserError, match=message):
            training.fit(wanted, log=lambda line: None)
    assert not list(tmp_path.iterdir())


def test_damaged_files_are_refused_before_workers_start(data, tmp_path, monkeypatch):
    import shutil

    started: list[int] = []
    monkeypatch.setattr(training, "_run_workers", lambda *given: started.append(1))
    shutil.copytree(data, tmp_path / "copy")
    broken = str(tmp_path / "copy")
    part = tmp_path / "copy" / read_info(broken).split("train").files[0]
    part.write_bytes(part.read_bytes()[:-100])
    for loading in ("memory", "stream"):
        settings = config(broken, schedule={"loading": loading})
        with pytest.raises(UserError, match=f"{part} is damaged"):
            training.fit(plan(settings, tmp_path, loading), log=lambda line: None)
    assert not started


def test_auto_loads_into_memory_what_fits_there(data, tmp_path, monkeypatch):
    assert not training.decide_loading(plan(config(data), tmp_path))
    monkeypatch.setattr(training, "_MEMORY_FRACTION", 1e-9)
    tight = config(data, scaling={"num_workers": 2, "cpus_per_worker": 0.5})
    assert training.decide_loading(plan(tight, tmp_path))


def test_history_is_written_whole_with_its_schema(tmp_path):
    rows = [
        {name: number if name == "epoch" else 0.5 for name in history.SCHEMA.names}
        for number in (1, 2)
    ]
    rows[0].pop("ended_at")  # as of runs from before it was kept
    rows[1]["ended_at"] = "2026-11-25T22:59:14.859658+00:00"
    path = str(tmp_path / "run" / "history.parquet")
    history.write_history(path, rows)
    history.write_history(path, rows)
    table = pq.read_table(path)
    assert table.schema.equals(history.SCHEMA) and table["epoch"].to_pylist() == [1, 2]
    assert [one and one.second for one in table["ended_at"].to_pylist()] == [None, 14]


def test_the_speed_of_a_run_is_the_median_of_its_epochs(data, tmp_path, monkeypatch):
    row = dict.fromkeys(history.SCHEMA.names, 0.5) | {"ended_at": None}
    rows = [{**row, "epoch": n, "images_per_s": s} for n, s in ((1, 654.0), (2, 262.0))]
    last = SimpleNamespace(path="checkpoint_2", epoch=2, history=rows, metrics=rows[-1])
    last.sha256, last.computed_in, last.environment = "0" * 64, "float32", {}
    monkeypatch.setattr(run_checkpoints, "latest", lambda path: last)
    monkeypatch.setattr(run_checkpoints, "find", lambda path, **settings: last)
    tried = plan(config(data), tmp_path)
    tried.files.write_config(tried.config.to_dict(), data_sha256="", loading="memory")
    assert training._result(tried, wall_s=1.0, log=print)["images_per_s"] == 458.0


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (UserError("--data: it is gone"), "worker 1 cannot load the images: --data: it is gone"),
        (MemoryError("no more"), "out of memory: no more"),
    ],
)
def test_a_worker_that_cannot_load_the_images_records_why(
    data, tmp_path, monkeypatch, error, reason
):
    def fails(*arguments: object, **settings: object) -> None:
        raise error

    monkeypatch.setattr(worker, "StreamFeed", fails)
    folder = RunFolder(str(tmp_path))
    with pytest.raises(type(error)):
        worker._open_data(
            {"slices": {}, "spare_cpus": 0.0},
            config(data),
            ProcessGroup(rank=1, size=2),
            folder,
            lambda images: images,
        )
    assert folder.failure == reason


def test_a_worker_that_does_not_see_the_runs_folder_says_so(tmp_path):
    with pytest.raises(UserError, match=r"the host of worker 0 does not see .*/absent: "):
        worker._prepare_folder(RunFolder(str(tmp_path / "absent")), note_group=False)


def tensors(folder: Path) -> dict[str, bytes]:
    """The tensor files of the last checkpoint of a run."""
    last = max(run_checkpoints.in_run(str(folder)), key=lambda one: one.epoch)
    return dict(last.files)


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """A run of four epochs on two workers that nothing befell: the folder and its result."""
    folder = tmp_path_factory.mktemp("runs")
    result = training.fit(plan(long_config(data), folder), log=lambda line: None)
    return folder / "tried", result


def long_config(data: str) -> TrainConfig:
    return config(data, schedule={"epochs": 4}, scaling={"num_workers": 2})


@pytest.mark.slow
def test_a_run_leaves_what_the_contract_says(data, undisturbed):
    folder, result = undisturbed
    saved = json.loads((folder / "run.json").read_text())
    assert saved == json.loads(json.dumps(result))
    assert saved["epochs"] == 4 and saved["last"]["epoch"] == 4
    assert saved["data_sha256"] == read_info(data).data_sha256
    assert saved["hardware"]["threads_per_worker"] == 1 and saved["versions"]["ray"]
    assert saved["computed_in"] == "float32"
    table = pq.read_table(folder / "history.parquet")
    assert table.schema.equals(history.SCHEMA)
    assert table["epoch"].to_pylist() == [1, 2, 3, 4]
    scores = table["validation_accuracy"].to_pylist()
    assert saved["best"]["validation_accuracy"] == max(scores)
    kept = {one.epoch for one in run_checkpoints.in_run(str(folder))}
    assert kept == {4, saved["best"]["epoch"]}
    others = {path.name for path in folder.iterdir() if not path.name.startswith("checkpoint_0")}
    assert others == {"config.json", "history.parquet", "run.json"}, "nothing of Ray Train's own"
    assert json.loads((folder / "config.json").read_text())["config"]["schedule"]["epochs"] == 4


@pytest.mark.slow
def test_a_finished_run_is_not_trained_again(data, undisturbed, monkeypatch):
    folder, result = undisturbed
    before = sorted(path.name for path in folder.iterdir())
    monkeypatch.setattr(training, "_run_workers", None)
    again = training.fit(plan(long_config(data), folder.parent), log=lambda line: None)
    assert again == json.loads(json.dumps(result))
    assert sorted(path.name for path in folder.iterdir()) == before


@contextlib.contextmanager
def killing_a_worker_after_the_first_epoch(folder: Path) -> Iterator[None]:
    with killing("ray::RayTrainWorker", (folder / "history.parquet").exists, most=1) as killed:
        yield
    assert killed, "no worker was there to be killed"


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_the_weights_are_the_same(data, undisturbed, tmp_path):
    with killing_a_worker_after_the_first_epoch(tmp_path / "tried"):
        result = training.fit(plan(long_config(data), tmp_path), log=lambda line: None)
    assert result["epochs"] == 4
    table = pq.read_table(tmp_path / "tried" / "history.parquet")
    assert table["epoch"].to_pylist() == [1, 2, 3, 4]
    assert tensors(tmp_path / "tried") == tensors(undisturbed[0])


@pytest.mark.slow
def test_a_broken_off_job_goes_on_by_the_same_command(data, undisturbed, tmp_path):
    """The driver and its whole cluster are killed; the same command then finishes the run."""
    flags = [*small.FLAGS, "--epochs", "4"]
    flags += ["--warmup-epochs", "0.5", "--learning-rate", "0.05", "--num-workers", "2"]
    command = [sys.executable, str(ROOT / "jobs/train.py"), "--data", data, *flags]
    command += ["--run", "tried", "--storage", str(tmp_path)]
    first = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and not (tmp_path / "tried/history.parquet").exists():
        assert first.poll() is None, "the job ended before its first epoch"
        time.sleep(0.02)
    kill_with_descendants(first)
    assert not (tmp_path / "tried" / "run.json").exists(), "killed too late to show anything"
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stdout and "resuming after epoch" in done.stdout
    assert done.stdout.strip().splitlines()[-1] == str(tmp_path / "tried")
    assert tensors(tmp_path / "tried") == tensors(undisturbed[0])


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_job_with_its_step(data, tmp_path):
    hopeless = config(
        data,
        model={"name": "sequential_cnn"},
        optimizer={"learning_rate": 100.0, "clip_grad_norm": 0.0},
        schedule={"warmup_epochs": 0},
    )
    start = time.monotonic()
    with pytest.raises(JobFailed, match=r"not finite at step \d+ \(epoch 1\)"):
        training.fit(plan(hopeless, tmp_path), log=lambda line: None)
    assert time.monotonic() - start < 100, "it was tried again"
    assert not (tmp_path / "tried" / "run.json").exists()


@pytest.mark.slow
def test_two_workers_stream_on_two_cpus_and_resume(data, tmp_path, capfd):
    """Ray Data hangs where workers hold every CPU; resumed, it streams the same images."""
    said: list[str] = []
    settings = config(
        data,
        schedule={"epochs": 3, "loading": "stream", "shuffle_buffer": 64, "global_batch_size": 30},
        scaling={"num_workers": 2, "cpus_per_worker": 1.0},
        transforms={"augmentation": "strong", "engine": "albumentations"},
    )
    with killing_a_worker_after_the_first_epoch(tmp_path / "tried"):
        result = training.fit(plan(settings, tmp_path), log=said.append)
    assert "resuming after epoch" in capfd.readouterr().out
    assert any("loading from a stream" in line for line in said)
    assert json.loads((tmp_path / "tried" / "config.json").read_text())["loading"] == "stream"
    undisturbed = training.fit(plan(settings, tmp_path, "whole"), log=lambda line: None)
    assert undisturbed["epochs"] == result["epochs"] == 3
    assert tensors(tmp_path / "tried") == tensors(tmp_path / "whole")
