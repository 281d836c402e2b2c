"""What a job asks of a cluster: it fits, is waited for, or is refused."""

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
from fer_ray.runtime.resources import Demand, Growth, NodeType

ROOT = Path(__file__).resolve().parents[1]
FLAGS = {"CPU": "--num-workers", "GPU": "--use-gpu"}


def demand(count: int = 1, **each: float) -> Demand:
    return Demand(each=each, count=count, flags=FLAGS, hint="fewer workers fit")


def test_processes_are_counted_node_by_node():
    nodes = [{"CPU": 2.0}, {"CPU": 0.3}, {"CPU": 4.0, "GPU": 1.0}, {}]
    assert resources.fitting({"CPU": 1.5}, nodes) == 3
    assert resources.fitting({"CPU": 0.1}, nodes) == 63
    assert resources.fitting({"CPU": 1.0, "GPU": 0.25}, nodes) == 4
    assert resources.fitting({"GPU": 0.6}, [{"GPU": 2.0}]) == 2, "a part is of one GPU"
    assert resources.fitting({"GPU": 0.7}, [{"GPU": 4.0}]) == 4
    assert resources.fitting({"GPU": 0.3}, [{"GPU": 2.0}]) == 6
    assert resources.fitting({"GPU": 2.0}, [{"GPU": 3.0}]) == 1


def test_a_cluster_grows_by_the_types_that_hold_most():
    types = (
        NodeType(resources={"CPU": 4.0, "GPU": 1.0}, most=5),
        NodeType(resources={"CPU": 8.0, "GPU": 4.0}, most=2),
        NodeType(resources={"CPU": 64.0}, most=9),
    )
    growth = Growth(types=types, most=3)
    assert growth.fitting({"CPU": 2.0, "GPU": 1.0}) == 9
    assert growth.fitting({"CPU": 5.0, "GPU": 1.0}) == 2
    assert Growth().fitting({"CPU": 1.0}) == 0


def check(monkeypatch, wanted: Demand, nodes: list[dict], growth: Growth) -> list[str]:
    """What is said of a cluster of such nodes that another process started."""
    import ray
    from ray._private import state

    totals = {kind: sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU")}
    alive = [{"Alive": True, "Resources": node} for node in nodes]
    monkeypatch.setattr(ray, "nodes", lambda: [*alive, {"Alive": False, "Resources": {"CPU": 99}}])
    monkeypatch.setattr(ray, "cluster_resources", lambda: totals)
    left = {str(number): node for number, node in enumerate(nodes)}
    monkeypatch.setattr(state, "available_resources_per_node", lambda: left)
    monkeypatch.setattr(resources, "_growth", lambda nodes: growth)
    monkeypatch.setattr(resources, "_follow", lambda *_: None)
    said: list[str] = []
    assert resources.check(wanted, log=said.append) == nodes
    return said


GPUS = Growth(types=(NodeType(resources={"CPU": 4.0, "GPU": 1.0}, most=4),), most=2)


@pytest.mark.parametrize(
    ("nodes", "growth", "fitting"),
    [
        ([{"CPU": 4.0, resources._HEAD: 1.0}], GPUS, 8),
        ([{"CPU": 4.0, "GPU": 1.0}, {"CPU": 4.0, "GPU": 1.0}], GPUS, 8),
        ([{"CPU": 8.0, "GPU": 4.0}], Growth(), 16),
        ([{"CPU": 4.0, "GPU": 1.0}], Growth(known=False), None),
    ],
)
def test_processes_are_counted_on_a_cluster_that_has_grown(monkeypatch, nodes, growth, fitting):
    import ray

    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": n} for n in nodes])
    monkeypatch.setattr(resources, "_growth", lambda alive: growth)
    assert resources.fitting_when_grown({"CPU": 0.5, "GPU": 0.25}) == fitting


def test_what_fits_is_not_spoken_of(monkeypatch):
    assert not check(monkeypatch, demand(2, CPU=1.0), [{"CPU": 2.0}], Growth())


def test_what_may_come_is_waited_for_and_told(monkeypatch):
    wanted = demand(2, CPU=1.0, GPU=1.0)
    for growth, more in ((GPUS, ""), (Growth(known=False), " (whether it may grow so far is")):
        (line,) = check(monkeypatch, wanted, [{"CPU": 2.0}], growth)
        message = "--use-gpu: 2 GPUs wanted, the cluster has 0: waiting for it to grow"
        assert line.startswith(message + more)


def test_that_a_cluster_has_grown_is_said_before_the_job_ends(monkeypatch):
    import ray

    monkeypatch.setattr(resources, "_FOLLOW_S", 60.0)  # the job ends before the next look
    monkeypatch.setattr(resources, "_growth", lambda nodes: GPUS)
    alive = [{"Alive": True, "Resources": {"CPU": 2.0}}]
    monkeypatch.setattr(ray, "nodes", lambda: list(alive))
    said: list[str] = []
    resources.check(demand(1, CPU=1.0, GPU=1.0), log=said.append)
    alive.append({"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}})
    resources.stop_following()
    assert said[1:] == ["the cluster has changed: 1 of 1 fit now"]
    resources.stop_following()
    assert len(said) == 2


def test_what_can_never_come_is_refused(monkeypatch):
    head = [{"CPU": 2.0, resources._HEAD: 1.0}]
    for count, growth, message in (
        (3, GPUS, "--use-gpu: 3 GPUs wanted, the cluster has 0, and grown as far as it may, 2 of"),
        (1, Growth(), "--use-gpu: 1 GPUs wanted, the cluster has 0; fewer workers fit"),
    ):
        with pytest.raises(UserError, match=message):
            check(monkeypatch, demand(count, CPU=1.0, GPU=1.0), head, growth)


def test_a_process_needs_one_node_for_all_that_it_reserves(monkeypatch):
    nodes = [{"CPU": 2.0}, {"CPU": 2.0}]
    with pytest.raises(UserError, match="3 CPUs together on one node for each, 0 of 1 fit"):
        check(monkeypatch, demand(1, CPU=3.0), nodes, Growth())


def test_what_others_hold_is_waited_for(monkeypatch):
    import ray
    from ray._private import state

    monkeypatch.setattr(resources, "_RELEASE_S", 0.0)

    def said(wanted: Demand, *free: float) -> list[str]:
        nodes = [{"Alive": True, "Resources": {"CPU": 2.0}} for _ in free]
        left = {str(number): {"CPU": amount} for number, amount in enumerate(free)}
        monkeypatch.setattr(ray, "nodes", lambda: nodes)
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0 * len(free)})
        monkeypatch.setattr(state, "available_resources_per_node", lambda: left)
        lines: list[str] = []
        resources.check(wanted, log=lines.append)
        return lines

    message = "--num-workers: 2 CPUs wanted, 0.5 of 2 are free: waiting for other jobs"
    assert said(demand(2, CPU=1.0), 0.5) == [message]
    assert not said(demand(2, CPU=1.0), 1.0, 1.0)
    message = "2 CPUs wanted, 2 of 4 are free, but 0 of 1 fit on single nodes: waiting for other"
    (line,) = said(demand(1, CPU=2.0), 1.0, 1.0)
    assert message in line


SETTINGS = {
    "max_workers": 2,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 1}, "max_workers": 0},
        "gpu": {"resources": {"CPU": 4, "GPU": 1}, "max_workers": 4},
    },
}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (SETTINGS, GPUS),
        (None, Growth()),  # a head without an autoscaler
        ({"max_workers": 2}, Growth(known=False)),
        # machines of one's own: what they have shows when they are there
        (
            {**SETTINGS, "available_node_types": {"local.cluster.node": {"resources": {}}}},
            Growth(known=False, most=2),
        ),
    ],
    ids=["autoscaler", "fixed", "damaged", "own machines"],
)
def test_the_head_knows_how_far_it_grows(settings, expected, tmp_path):
    """By the process that Ray 2.60 starts on every head, here one that looks like it."""
    script, session = tmp_path / "monitor.py", f"session_{tmp_path.name}_{os.getpid()}"
    script.write_text("import time; time.sleep(60)")
    command = [sys.executable, str(script), f"--logs-dir=/tmp/ray/{session}/logs"]
    if settings is not None:
        path = tmp_path / "settings.yaml"
        path.write_text(json.dumps(settings))
        command.append(f"--autoscaling-config={path}")
    with subprocess.Popen(command) as monitor:
        found = resources.growth_of(session)
        monitor.kill()
    assert found == expected
    assert resources.growth_of(session) == Growth(known=False), "a head that is scaled from outside"


def test_machines_of_ones_own_are_all_when_they_are_there():
    own = Growth(known=False, most=2)
    assert [own.of(nodes) for nodes in (1, 2, 3)] == [own, own, Growth()]
    assert Growth(known=False).of(9) == Growth(known=False)
    assert GPUS.of(9) == GPUS


def test_a_real_head_without_an_autoscaler_is_known_for_one(ray_cluster, monkeypatch):
    session = ray_cluster.get_runtime_context().get_session_name()
    assert resources.growth_of(session) == Growth()
    monkeypatch.setenv("RAY_ADDRESS", "as a job that joined it would see it")
    with pytest.raises(UserError, match="3 CPUs wanted, the cluster has 2 and does not grow by"):
        resources.check(demand(3, CPU=1.0))


class Growing:
    """A cluster whose head has no CPU; its autoscaler may start one node of two CPUs."""

    def __init__(self, folder: Path) -> None:
        from ray.autoscaler._private.monitor import BASE_READONLY_CONFIG

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
        settings = {**BASE_READONLY_CONFIG, "provider": provider, "available_node_types": types}
        settings |= {"max_workers": 1, "idle_timeout_minutes": 5}
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
    assert "RAY_ADDRESS: 1 CPUs wanted, the cluster has 0: waiting for it to grow" in done.stdout
    assert "the cluster has changed: 1 of 1 fit now" in done.stdout
    assert done.stdout.strip().endswith(data)
    train = ["--data", data, "--storage", str(tmp_path / "runs"), "--num-workers", "3"]
    train += ["--global-batch-size", "9"]
    done = growing.job("train.py", *train)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert "--num-workers: 3 CPUs wanted, the cluster has 2, and grown as far as it may" in line
    assert not (tmp_path / "runs").exists()
