"""Training and prediction in the process itself (`--local`): the same results, without Ray."""

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import small
import torch
from processes import kill_with_descendants, wait_for

from fer_ray.config.schema import TrainConfig
from fer_ray.data import predictions
from fer_ray.data.dataset import read_info
from fer_ray.data.run_folder import RunFolder
from fer_ray.errors import JobFailed, UserError
from fer_ray.inference import plan as planning
from fer_ray.inference import run as inference
from fer_ray.models import run_checkpoints
from fer_ray.training import run as training
from fer_ray.training import worker

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["config.json", "history.parquet", "run.json"]


def config(data: str, **sections) -> TrainConfig:
    sections["schedule"] = {"global_batch_size": 32, **sections.get("schedule", {})}
    return TrainConfig.from_dict({**small.config(**sections).to_dict(), "data": data})


def plan(config: TrainConfig, folder: Path, *, local: bool = True) -> training.Plan:
    return training.plan(config, storage_path=str(folder), run="tried", local=local)


def fit(config: TrainConfig, folder: Path, *, local: bool = True) -> dict:
    return training.fit(plan(config, folder, local=local), log=lambda line: None)


def weights(folder: Path) -> dict[str, bytes]:
    """The tensor files of a run's last checkpoint."""
    return dict(max(run_checkpoints.in_run(str(folder / "tried")), key=lambda one: one.epoch).files)


@pytest.fixture(scope="module")
def local_run(drawn_faces, tmp_path_factory) -> Path:
    """The folder of runs in which a local run of two epochs, `tried`, has finished."""
    folder = tmp_path_factory.mktemp("runs")
    fit(config(drawn_faces), folder)
    return folder


def test_a_local_run_leaves_the_same_files_as_one_on_ray(drawn_faces, local_run):
    names = {path.name for path in (local_run / "tried").iterdir()}
    assert {name for name in names if not name.startswith("checkpoint_")} == set(NAMES)
    result = json.loads((local_run / "tried" / "run.json").read_text())
    assert result["epochs"] == 2 and result["num_workers"] == 1 and result["loading"] == "memory"
    assert result["data_sha256"] == read_info(drawn_faces).data_sha256
    assert result["hardware"]["threads_per_worker"] == 1 and result["versions"]["ray"]
    assert pq.read_table(local_run / "tried" / "history.parquet")["epoch"].to_pylist() == [1, 2]


@pytest.mark.slow
def test_a_local_run_is_bit_for_bit_that_of_one_worker_on_ray(drawn_faces, local_run, tmp_path):
    on_ray = fit(config(drawn_faces), tmp_path, local=False)
    assert weights(tmp_path) == weights(local_run)
    local = json.loads((local_run / "tried" / "run.json").read_text())
    assert local.keys() == on_ray.keys()
    for name in ("seconds", "images_per_s", "ended_at"):
        del local["last"][name], on_ray["last"][name]
    assert local["last"] == on_ray["last"]
    assert local["hardware"] == on_ray["hardware"] and local["versions"] == on_ray["versions"]


def test_an_interrupted_local_run_resumes_to_the_same_weights(
    drawn_faces, local_run, tmp_path, monkeypatch, capfd
):
    def interrupted(self, rows):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "write_history", interrupted)  # after the first checkpoint
        with pytest.raises(KeyboardInterrupt):
            fit(config(drawn_faces), tmp_path)
    assert fit(config(drawn_faces), tmp_path)["epochs"] == 2
    assert "resuming after epoch 1" in capfd.readouterr().out
    assert weights(tmp_path) == weights(local_run)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"scaling": {"num_workers": 2}}, "--local: trains with one worker, and 2 are requested"),
        ({"scaling": {"num_workers": 1, "use_gpu": True}}, "--use-gpu: --local runs in this"),
        ({"schedule": {"loading": "stream"}}, "--local: .*--loading stream.*leave --local out"),
    ],
)
def test_what_needs_ray_is_refused(drawn_faces, tmp_path, sections, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=message) as caught:
        plan(config(drawn_faces, **sections), tmp_path)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_a_run_that_began_to_stream_is_refused(drawn_faces, tmp_path):
    begun = plan(config(drawn_faces), tmp_path)
    begun.files.write_config(
        begun.config.to_dict(), data_sha256=begun.info.data_sha256, loading="stream"
    )
    with pytest.raises(UserError, match="--local: run tried streams its images"):
        plan(config(drawn_faces), tmp_path)


def test_a_loss_that_is_not_finite_ends_a_local_run_with_its_step(drawn_faces, tmp_path):
    hopeless = config(
        drawn_faces,
        model={"name": "sequential_cnn"},
        optimizer={"learning_rate": 100.0, "clip_grad_norm": 0.0},
        schedule={"warmup_epochs": 0},
    )
    with pytest.raises(JobFailed, match=r"not finite at step \d+ \(epoch 1\)"):
        fit(hopeless, tmp_path)
    assert not (tmp_path / "tried" / "run.json").exists()


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (MemoryError("no more"), JobFailed, "run tried failed .* no more"),
        (RuntimeError("a defect"), RuntimeError, "^a defect$"),
    ],
)
def test_memory_that_runs_out_is_one_line_and_a_defect_is_not(
    drawn_faces, tmp_path, monkeypatch, error, expected, message
):
    def fails(*arguments, **settings):
        raise error

    monkeypatch.setattr(worker.loop, "train", fails)
    with pytest.raises(expected, match=message):
        fit(config(drawn_faces), tmp_path)


def job(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "jobs" / arguments[0]), *arguments[1:]]


JOB = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
from fer_ray import cli
printed = []
def log(line):
    assert printed or "torch" not in sys.modules, "the first line came after seconds of imports"
    printed.append(line)
cli.log = log
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")
assert "ray" not in sys.modules and "--local" in sys.argv
print(*printed[:1], *printed[-1:], sep="\\n")
"""


@pytest.mark.parametrize("name", ["train.py", "predict.py"])
def test_local_jobs_print_before_they_import_torch_and_never_import_ray(
    drawn_faces, local_run, name, tmp_path
):
    output = ["--storage" if name == "train.py" else "--output", str(tmp_path)]
    flags = {
        "train.py": ["--run", "short", "--width", "4", "--epochs", "1"],
        "predict.py": ["--run", "short", "--checkpoint", str(local_run / "tried")],
    }[name]
    _, *command = job(name, "--data", drawn_faces, *output, *flags, "--local")
    command = [sys.executable, "-c", JOB, str(ROOT), *command]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.splitlines()[-2:]
    assert first.startswith("checking the ") and last.startswith(str(tmp_path / "short"))


@pytest.mark.slow
def test_a_killed_local_job_resumes_by_the_same_command(drawn_faces, tmp_path):
    flags = ["--width", "4", "--epochs", "4", "--global-batch-size", "8", "--precision", "float32"]
    command = job("train.py", "--data", drawn_faces, *flags, "--local", "--run", "tried")
    for name in ("killed", "undisturbed"):
        command_of = [*command, "--storage", str(tmp_path / name)]
        if name == "killed":
            started = subprocess.Popen(command_of, stdout=subprocess.DEVNULL)
            wait_for((tmp_path / "killed/tried/history.parquet").exists)
            kill_with_descendants(started)
            assert not (tmp_path / "killed/tried/run.json").exists(), "killed too late"
        done = subprocess.run(command_of, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        assert ("resuming after epoch" in done.stdout) == (name == "killed")
    assert weights(tmp_path / "killed") == weights(tmp_path / "undisturbed")


@pytest.mark.parametrize("source", ["data", "images"])
def test_local_predictions_are_those_of_ray(drawn_faces, local_run, hostile_zip, source, tmp_path):
    """A zip with files that cannot be decoded: their errors are the same rows too."""
    given = {"data": drawn_faces} if source == "data" else {"images": str(hostile_zip)}
    tables, manifests = [], []
    for local in (True, False):
        chosen = planning.plan(
            checkpoint_path=str(local_run / "tried"),
            split="validation",
            output=str(tmp_path / str(local)),
            **given,
        )
        folder = inference.predict(chosen, num_actors=1, local=local, log=lambda line: None)
        tables.append(predictions.read(folder).table.drop_columns(["predicted_at"]))
        manifests.append(json.loads((Path(folder) / "_manifest.json").read_text()))
    assert tables[0].num_rows and tables[0].equals(tables[1])
    assert manifests[0] == manifests[1]


@dataclass(frozen=True)
class FailingSource:
    """Loose images that the disk does not give."""

    def read(self, path: str, at: bytes) -> bytes:
        raise OSError(5, "Input/output error")


@pytest.mark.parametrize(
    ("settings", "expected", "message"),
    [
        ({}, JobFailed, r"a worker failed: \[Errno 5\] Input/output error$"),
        ({"num_actors": 2}, UserError, "--num-actors: --local predicts in one process, not in 2"),
        ({"use_gpu": True}, UserError, "--use-gpu: --local runs in this process, which has no GPU"),
    ],
)
def test_a_local_prediction_that_fails_is_one_line_and_leaves_nothing(
    local_run, hostile_zip, tmp_path, monkeypatch, settings, expected, message
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = tmp_path / "output" / "predictions"
    chosen = planning.plan(
        checkpoint_path=str(local_run / "tried"),
        images=str(hostile_zip),
        split="images",
        output=str(output),
    )
    with pytest.raises(expected, match=message):
        failing = replace(chosen, source=FailingSource())
        inference.predict(failing, **settings, local=True, log=lambda line: None)
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".parquet"]
