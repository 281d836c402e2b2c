"""The command lines: help, and mistakes that end in one line and status 2 before Ray starts."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
JOBS = sorted(path.name for path in (ROOT / "jobs").glob("*.py"))


def job(name: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "jobs" / name), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", JOBS)
def test_help(name, tmp_path):
    done = job(name, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {name}")
    assert "(default: None)" not in done.stdout


def test_the_list_of_models(tmp_path):
    done = job("train.py", "--list-models", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("custom_cnn (small)", "custom_cnn (full)", "efficientnet_b2", "sequential_cnn"):
        assert name in done.stdout


WRONG = {
    "missing flag": ("train.py", [], "--data"),
    "no data set": ("train.py", ["--data", "absent"], "is not a prepared dataset"),
    "unknown model": ("train.py", ["--data", "x", "--model", "resnet"], "custom_cnn"),
    "unknown flag": ("train.py", ["--data", "x", "--epoch", "3"], "did you mean '--epochs'?"),
    "range": ("train.py", ["--data", "x", "--label-smoothing", "2"], "from 0 to 0.9"),
    "two GPUs a trial": (
        "tune.py",
        ["--data", "x", "--sweep", "normalization", "--gpus-per-trial", "2"],
        "above 0, at most 1",
    ),
    "run name": ("train.py", ["--data", "x", "--run", "a/b"], "not a plain name"),
    "no checkpoint": ("predict.py", ["--checkpoint", "absent", "--data", "x"], "no checkpoint"),
    "two inputs": (
        "predict.py",
        ["--checkpoint", "x", "--data", "x", "--images", "y"],
        "exactly one",
    ),
    "no predictions": ("evaluate.py", ["--predictions", "absent"], "no such folder"),
    "no source": ("prepare.py", ["--source", "absent", "--output", "o"], "does not exist"),
}


@pytest.mark.parametrize("case", WRONG, ids=list(WRONG))
def test_mistakes_end_in_one_line_and_status_2(case, tmp_path):
    name, arguments, message = WRONG[case]
    done = job(name, *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(f"{name}: ") and message in lines[0]
    assert not list(tmp_path.iterdir()), "a refused job leaves nothing behind"


def test_a_submitted_job_refuses_outputs_that_ray_would_delete(tmp_path):
    copy = tmp_path / "_ray_pkg_0123"
    copy.mkdir()
    for name, flag in (("train.py", "--storage"), ("predict.py", "--output")):
        given = {"train.py": ["--data", "x"], "predict.py": ["--checkpoint", "x"]}[name]
        done = job(name, *given, flag, "results", cwd=copy)
        assert done.returncode == 2
        assert f"{flag}: results would lie in Ray's temporary copy" in done.stderr
