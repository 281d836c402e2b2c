"""What a job requests of a cluster: it fits, is waited for, or is refused."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from nodes import free_ports
from processes import kill_with_descendants

from fer_ray.errors import UserError
from fer_ray.runtime import resources
from fer_ray.runtime.resources import Demand

ROOT = Path(__file__).resolve().parents[1]
FLAGS = {"CPU": "--num-workers", "GPU": "--use-gpu"}


def demand(count: int = 1, **each: float) -> Demand:
    return Demand(each=each, count=count, flags=FLAGS, hint="fewer workers fit")


def test_processes_are_counted_node_by_node():
    nodes = [{"CPU": 2.0}, {"CPU": 0.3}, {"CPU": 4.0, "GPU": 1.0}, {}]
    assert resources.fitting({"CPU": 1.5}, nodes) == 3
    assert resources.fitting({"CPU": 0.1}, nodes) == 63
    assert resources.fitting({"CPU": 1.0, "GPU": 0.25}, nodes) == 4
    assert resources.fitting({"GPU": 0.6}, [{"GPU": 2.0}]) == 2, "a fraction is of one GPU"
    assert resources.fitting({"GPU": 0.7}, [{"GPU": 4.0}]) == 4
    assert resources.fitting({"GPU": 0.3}, [{"GPU": 2.0}]) == 6
    assert resources.fitting({"GPU": 2.0}, [{"GPU": 3.0}]) == 1


@pytest.fixture
def cluster(monkeypatch):
    """Pretends a cluster that another process started: `cluster(nodes, maximum, free)`."""
    import ray

    def pretend(nodes: list[dict], maximum: str = "", free: dict | None = None) -> None:
        alive = [{"Alive": True, "Resources": node} for node in nodes]
        dead = {"Alive": False, "Resources": {"CPU": 99.0}}
        totals = {name: sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU")}
        monkeypatch.setattr(ray, "nodes", lambda: [*alive, dead])
        monkeypatch.setattr(ray, "cluster_resources", lambda: totals)
        monkeypatch.setattr(ray, "available_resources", lambda: free or totals)
        monkeypatch.setattr(resources, "_RELEASE_S", 0.0)
        monkeypatch.setenv("RAY_ADDRESS", "ray.example:6379")
        monkeypatch.setenv(resources.MAXIMUM, maximum)

    return pretend


def lines_of(request: Demand) -> list[str]:
    """What `check` reports about a request that it accepts."""
    lines: list[str] = []
    resources.check(request, log=lines.append)
    return lines


def test_a_request_that_fits_is_not_reported(cluster):
    cluster([{"CPU": 2.0}])
    assert not lines_of(demand(2, CPU=1.0))


@pytest.mark.parametrize("maximum", ["", "CPU=8,GPU=2"])
def test_a_request_is_waited_for_unless_it_exceeds_the_maximum(cluster, maximum):
    cluster([{"CPU": 2.0}], maximum)
    (line,) = lines_of(demand(2, CPU=1.0, GPU=1.0))
    expected = "--use-gpu: 2 GPUs requested, the cluster has 0: waiting for the cluster to grow"
    assert line.startswith(expected)
    assert ("stop the job and request less" in line) == (not maximum)


@pytest.mark.parametrize(
    ("count", "maximum", "message"),
    [
        (3, "CPU=8,GPU=2", "and at its maximum .*=CPU=8,GPU=2. 2 of 3 would fit; fewer workers"),
        (1, "fixed", "--use-gpu: 1 GPUs requested, the cluster has 0 and does not grow; fewer"),
        (1, "many", "'many' is neither 'fixed' nor totals such as 'CPU=64,GPU=8'"),
    ],
)
def test_a_request_that_can_never_be_met_is_refused(cluster, count, maximum, message):
    cluster([{"CPU": 2.0}], maximum)
    with pytest.raises(UserError, match=message) as refused:
        resources.check(demand(count, CPU=1.0, GPU=1.0))
    assert "\n" not in str(refused.value)


def test_a_cluster_that_this_job_started_does_not_grow(ray_cluster):
    with pytest.raises(UserError, match="3 CPUs requested, the cluster has 2; fewer workers fit"):
        resources.check(demand(3, CPU=1.0))


def test_a_process_needs_one_node_for_all_that_it_reserves(cluster):
    cluster([{"CPU": 2.0}, {"CPU": 2.0}], "fixed")
    with pytest.raises(UserError, match="each process needs 3 CPUs on one node: 0 of 1 fit"):
        resources.check(demand(1, CPU=3.0))


def test_resources_that_other_jobs_hold_are_waited_for(cluster):
    cluster([{"CPU": 2.0}], free={"CPU": 0.5})
    expected = "--num-workers: 2 CPUs requested, 0.5 of 2 are free: waiting for other jobs to end"
    assert lines_of(demand(2, CPU=1.0)) == [expected]


@pytest.mark.parametrize(
    ("nodes", "maximum", "fitting"),
    [
        ([{"CPU": 4.0}], "CPU=8,GPU=2", 8),
        ([{"CPU": 8.0, "GPU": 4.0}], "fixed", 16),
        ([{"CPU": 8.0, "GPU": 4.0}], "CPU=4,GPU=1", 16),
        ([{"CPU": 4.0, "GPU": 1.0}], "", None),
    ],
)
def test_processes_are_counted_on_a_cluster_that_has_grown(cluster, nodes, maximum, fitting):
    cluster(nodes, maximum)
    assert resources.fitting_at_maximum({"CPU": 0.5, "GPU": 0.25}) == fitting


class Growing:
    """A cluster whose head has no CPU; its autoscaler may start one node of two CPUs."""

    def __init__(self, folder: Path) -> None:
        port, client, dashboard = free_ports(3)
        self.address = f"127.0.0.1:{port}"
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.environment = {**os.environ, **token}
        provider = {"type": "fake_multinode", "gcs_address": self.address}
        provider |= {"use_node_id_as_ip": True, "disable_node_updaters": True}
        types = {
            "ray.head.default": {"resources": {}, "node_config": {}, "max_workers": 0},
            "two": {"resources": {"CPU": 2}, "node_config": {}, "max_workers": 1},
        }
        settings = {key: {} for key in ("auth", "docker", "file_mounts")}
        settings |= {key: [] for key in ("cluster_synced_files", "rsync_exclude", "rsync_filter")}
        who = ("initialization", "setup", "head_setup", "worker_setup")
        who += ("head_start_ray", "worker_start_ray")
        settings |= {f"{name}_commands": [] for name in who}
        settings |= {"cluster_name": "growing", "file_mounts_sync_continuously": False}
        settings |= {"provider": provider, "available_node_types": types, "max_workers": 1}
        settings |= {"head_node_type": "ray.head.default", "upscaling_speed": 1.0}
        settings |= {"idle_timeout_minutes": 5}
        (folder / "settings.yaml").write_text(json.dumps(settings))
        command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block"]
        command += [f"--port={port}", f"--ray-client-server-port={client}"]
        command += [f"--dashboard-port={dashboard}", "--dashboard-agent-listen-port=0"]
        command += ["--min-worker-port=0", "--max-worker-port=0", "--node-ip-address=127.0.0.1"]
        command += ["--num-cpus=0", f"--temp-dir={folder}", "--disable-usage-stats"]
        command += [f"--autoscaling-config={folder}/settings.yaml"]
        log = (folder / "head.log").open("w")
        self.head = subprocess.Popen(
            command,
            env={**self.environment, "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        deadline = time.monotonic() + 60
        while "Ray runtime started" not in (folder / "head.log").read_text():
            assert self.head.poll() is None and time.monotonic() < deadline, log.name
            time.sleep(0.2)

    def job(self, name: str, *flags: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / "jobs" / name), *flags]
        environment = {**self.environment, "RAY_ADDRESS": self.address}
        environment[resources.MAXIMUM] = "CPU=2"
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def growing():
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        cluster = Growing(Path(folder))
        yield cluster
        kill_with_descendants(cluster.head)


@pytest.mark.slow
def test_a_job_waits_for_a_real_autoscaler_as_far_as_it_goes(growing, tmp_path):
    data = str(tmp_path / "faces")
    source = ["--source", "synthetic", "--num-images", "70", "--output", data]
    done = growing.job("prepare.py", *source)
    assert done.returncode == 0, done.stderr
    expected = "RAY_ADDRESS: 1 CPUs requested, the cluster has 0: waiting for the cluster to grow"
    assert expected in done.stdout
    assert done.stdout.strip().endswith(data)
    train = ["--data", data, "--storage", str(tmp_path / "runs"), "--num-workers", "3"]
    train += ["--global-batch-size", "9", "--batch-norm-group", "3"]
    done = growing.job("train.py", *train)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert "--num-workers: 3 CPUs requested, the cluster has 2, and at its maximum" in line
    assert not (tmp_path / "runs").exists()
