"""Jobs that receive SIGTERM or SIGINT end soon, in one line, and leave no process behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small
from processes import descendants, printed_by_jobs, wait_for
from sweeping import TWO, grid

from fer_ray.runtime import termination

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 3.0
"""`ray job stop` kills a job so long after its SIGTERM."""


def start(job: str, *flags: str, cwd: Path) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "jobs" / job), *flags]
    output = {name: (cwd / f"{name}.txt").open("w") for name in ("stdout", "stderr")}
    return subprocess.Popen(command, cwd=cwd, **output)


def end(job: subprocess.Popen, *numbers: int) -> float:
    """Sends signals and waits for the job and its processes; returns the seconds it took."""
    processes = set(descendants(job.pid))
    begin = time.monotonic()
    for number in numbers:
        job.send_signal(number)
        time.sleep(0.05)
    job.wait(60)
    seconds = time.monotonic() - begin
    left = {process for process in processes - {job.pid} if is_alive(process)}
    assert not left, [Path(f"/proc/{process}/cmdline").read_text() for process in left]
    return seconds


def is_alive(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def assert_ended_in_one_line(name: str, folder: Path, status: int, code: int) -> None:
    errors = (folder / "stderr.txt").read_text()
    assert status == code, errors
    lines = [line for line in printed_by_jobs(errors) if line]
    assert lines == [f"{name}: {termination.LINE}"]


LONG = [*small.FLAGS, "--epochs", "2000"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)]
)
def test_a_training_ends_and_resumes(drawn_faces, tmp_path, number):
    flags = ["--data", drawn_faces, "--storage", str(tmp_path), "--run", "x", *LONG]
    job = start("train.py", *flags, "--num-workers", "1", cwd=tmp_path)
    wait_for(lambda: list(tmp_path.glob("x/checkpoint_*/checkpoint.json")))
    seconds = end(job, number)
    assert_ended_in_one_line("train.py", tmp_path, job.returncode, 128 + number)
    assert number != signal.SIGTERM or seconds < LIMIT_S
    assert not list(tmp_path.glob("x/.checkpoint*"))


@pytest.mark.slow
def test_a_sweep_ends_with_its_tables_written(drawn_faces, tmp_path):
    grid(tmp_path, TWO)
    flags = ["--data", drawn_faces, "--storage", str(tmp_path), "--sweep", "tried.toml", *LONG]
    job = start("tune.py", *flags, cwd=tmp_path)
    wait_for(lambda: list(tmp_path.glob("tried/trials/*/checkpoint_*/checkpoint.json")))
    seconds = end(job, signal.SIGTERM)
    assert_ended_in_one_line("tune.py", tmp_path, job.returncode, 143)
    assert seconds < LIMIT_S


@pytest.mark.slow
@pytest.mark.parametrize("wait_s", [pytest.param(0.3, marks=pytest.mark.long), 1.5, 3.0])
def test_a_job_ends_while_ray_starts(tmp_path, wait_s):
    flags = ["--source", "synthetic", "--output", str(tmp_path / "out")]
    job = start("prepare.py", *flags, "--num-images", "1000000", cwd=tmp_path)
    wait_for(lambda: "starting Ray" in (tmp_path / "stdout.txt").read_text())
    time.sleep(wait_s)
    seconds = end(job, signal.SIGTERM)
    assert_ended_in_one_line("prepare.py", tmp_path, job.returncode, 143)
    assert seconds < LIMIT_S
    time.sleep(1)  # whatever was being started
    name = str(tmp_path / "out")
    for process in Path("/proc").glob("[0-9]*"):
        try:
            assert name not in (process / "cmdline").read_text()
            environment = (process / "environ").read_bytes()
        except (OSError, UnicodeDecodeError):
            continue
        assert f"PWD={tmp_path}".encode() not in environment, process


BUSY = """
import sys, time
from fer_ray import cli
from fer_ray.runtime import termination

class Loses:
    def __del__(self):
        time.sleep(30)  # an exception raised in here is printed and lost

def main():
    print("begun", flush=True)
    if sys.argv[1] == "finalizer":
        Loses()
    else:
        try:
            time.sleep(30)
        finally:
            print("ending", flush=True)
            time.sleep(30)  # a cleanup that takes its time
    time.sleep(30)

cli.run(main)
"""


@pytest.mark.parametrize(
    ("where", "numbers", "limit_s"),
    [
        ("finalizer", [signal.SIGTERM], LIMIT_S),
        ("cleanup", [signal.SIGTERM], LIMIT_S),
        ("cleanup", [signal.SIGINT, signal.SIGINT], 1.0),
        ("cleanup", [signal.SIGTERM, signal.SIGTERM], 1.0),
    ],
)
def test_nothing_keeps_a_job_from_ending(tmp_path, where, numbers, limit_s):
    job = subprocess.Popen(
        [sys.executable, "-c", BUSY, where],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert job.stdout.readline() == "begun\n"
    time.sleep(0.2)
    assert end(job, *numbers) < limit_s
    assert job.returncode == 128 + numbers[0]
    assert job.stderr.read().splitlines()[-1] == f"-c: {termination.LINE}"
