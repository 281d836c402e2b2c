"""Jobs on machines whose GPUs do not work: they end soon, and what is unfinished can be resumed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small
import torch
from processes import printed_by_jobs
from sweeping import TWO, grid

from fer_ray.sweeps.store import FINISHED, SweepFolder

ROOT = Path(__file__).resolve().parents[1]
TWO_GPUS = """
import runpy, sys
from fer_ray import cli

cli.start_ray(num_cpus=3, num_gpus=2)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a job on a machine where Ray is set to two GPUs, which are not there."""
SMALL = [*small.FLAGS, "--epochs", "2"]


def run_job(name: str, *flags: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", TWO_GPUS, str(ROOT / "jobs" / name), *SMALL, *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240
    )


pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.mark.slow
def test_a_sweep_without_a_driver_leaves_its_trials_to_the_same_command(drawn_faces, tmp_path):
    grid(tmp_path, TWO)
    flags = ["--data", drawn_faces, "--storage", str(tmp_path), "--sweep", "tried.toml"]
    start = time.monotonic()
    done = run_job("tune.py", *flags, "--seeds", "2", "--gpus-per-trial", "1", cwd=tmp_path)
    assert time.monotonic() - start < 150
    assert done.returncode == 1, done.stderr
    (line,) = [line for line in printed_by_jobs(done.stderr) if line.startswith("tune.py: ")]
    assert line.startswith("tune.py: no node is left that a trial can use (the GPU of node ")
    assert "NVIDIA driver" in line and "4 trials are not over; repair the nodes and run" in line
    assert "Traceback" not in done.stdout + done.stderr
    trials = SweepFolder(str(tmp_path / "tried")).trials()
    assert trials and not any(trial.is_over for trial in trials)


@pytest.mark.slow
def test_a_training_without_a_driver_ends_in_one_line(drawn_faces, tmp_path):
    flags = ["--data", drawn_faces, "--storage", str(tmp_path), "--run", "x", "--use-gpu"]
    done = run_job("train.py", *flags, "--num-workers", "1", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    (line,) = [line for line in printed_by_jobs(done.stderr) if line.startswith("train.py: ")]
    assert line.startswith("train.py: the GPU of node ") and "NVIDIA driver" in line
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "x/run.json").exists()


BROKEN_NODE = """
import os
import sys
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

import small
import sweeping
from fer_ray import cli
from fer_ray.sweeps.run import run_sweep
from fer_ray.training import run

data, folder = sys.argv[1:]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
cli.start_ray(address=cluster.address)
run_sweep(sweeping.plan(data, Path(folder), num_seeds=2), log=cli.log)
Path(os.environ["BROKEN_NODE"]).unlink()
values = small.config(scaling={"max_failures": 0}).to_dict() | {"data": data}
config = run.TrainConfig.from_dict(values)
run.fit(run.plan(config, storage_path=folder, run="plain"), log=cli.log)
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
def test_a_node_whose_driver_is_broken_is_avoided(drawn_faces, tmp_path):
    """Without that, the node would fail all trials while the other one trains its first."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    environment |= {"FER_RAY_PLUGINS": "broken_node", "BROKEN_NODE": str(tmp_path / "node")}
    command = [sys.executable, "-c", BROKEN_NODE, drawn_faces, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert 1 <= done.stdout.count("was interrupted: the GPU of node ") <= 2
    trials = SweepFolder(str(tmp_path / "tried")).trials()
    assert [(trial.status, len(trial.history)) for trial in trials] == [(FINISHED, 2)] * 4
    assert done.stdout.count(": going on without this node") == 1
    assert (tmp_path / "plain/run.json").exists() and not (tmp_path / "plain/failure.json").exists()
