"""A cluster of two hosts: network namespaces with their own addresses, links and firewall."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import check
import hosts
import nodes
import pyarrow.parquet as pq
import pytest
from commands import check as parse
from network import HOSTS, OPEN_PORT, Network, NotAllowed

from fer_ray.errors import JobFailed

ROOT = Path(__file__).resolve().parents[1]
RAY = Path(sys.executable).parent / "ray"
EPOCHS = 10
# on two busy cores all of them took nine minutes
pytestmark = pytest.mark.timeout(1200)


def test_the_submitted_commands_are_valid(tmp_path):
    for step in check.steps(str(tmp_path), "check", ["--num-workers", "2"]):
        parse(step.command[1:])


def test_the_nodes_start_as_on_ones_own_machines():
    text = (ROOT / "cluster" / "on_premise.yaml").read_text()
    assert all(flag in text.split() for flag in (*hosts.HEAD, *hosts.BOTH))
    assert f"--address=$RAY_HEAD_IP:{hosts.WORKER[0].rpartition(':')[2]}" in text


def test_an_error_of_the_user_is_one_line_and_status_2(tmp_path):
    for script, arguments, message in (
        ("hosts.py", [], "give a command to run on the head after --"),
        ("hosts.py", ["--name", "a/b", "--", "true"], "--name: "),
        ("check.py", ["--output", str(tmp_path)], "RAY_API_SERVER_ADDRESS: is not set"),
    ):
        command = [sys.executable, str(ROOT / "cluster" / script), *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"}
        )
        assert done.returncode == 2 and done.stdout == ""
        assert message in done.stderr and done.stderr.count("\n") == 1


# ------------------------------------------------------------------ hosts, without Ray


def connects(address: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(2)
        return probe.connect_ex((address, port)) == 0


def reaches(network: Network, host: str, address: str, port: int) -> bool:
    """Whether a process on a host can connect to an address."""
    with network.inside(host):
        return connects(address, port)


@pytest.fixture
def bare():
    """Hosts on which nothing runs."""
    network = Network(f"fer-bare{os.getpid()}")
    try:
        network.create()
    except NotAllowed as reason:
        pytest.skip(f"no network namespaces here: {reason}")
    yield network
    network.remove()


def test_hosts_reach_each_other_and_the_outside_reaches_open_ports(bare):
    with bare.inside("head"):
        servers = {port: socket.create_server(("0.0.0.0", port)) for port in (OPEN_PORT, 6379)}
    try:
        head = HOSTS["head"]
        assert reaches(bare, "worker", head, 6379)
        assert reaches(bare, "outside", head, OPEN_PORT)
        assert not reaches(bare, "outside", head, 6379)
        bare.open_the_gate()
        assert reaches(bare, "outside", head, 6379)
        bare.close_the_gate()
        assert not reaches(bare, "outside", head, 6379)
        bare.disconnect("worker")
        assert not reaches(bare, "worker", head, 6379)
        bare.reconnect("worker")
        assert reaches(bare, "worker", head, 6379)
    finally:
        for server in servers.values():
            server.close()


def test_without_namespaces_the_reason_is_one_line(monkeypatch):
    def refuse(*arguments: str) -> None:
        output = "mount --make-shared /run/netns failed: Operation not permitted\nmore\n"
        raise subprocess.CalledProcessError(1, "ip", stderr=output)

    monkeypatch.setattr("network._ip", refuse)
    with pytest.raises(NotAllowed, match=r"^mount .* failed: Operation not permitted$"):
        Network("fer-never").create()


# ------------------------------------------------------------------ a cluster of hosts


def remove_logs(name: str) -> None:
    """Removes the logs of a cluster."""
    folder = hosts.Cluster.named(name).folder
    shutil.rmtree(folder)
    Path(f"{folder}.lock").unlink()


@pytest.fixture(scope="module")
def cluster():
    for gate in Path("/run/netns").glob("fer-t*-gate"):  # of tests that were killed
        killed = gate.name.removeprefix("fer-").removesuffix("-gate")
        if not Path("/proc", killed.removeprefix("t")).exists():
            hosts.Cluster.named(killed).clear()
            remove_logs(killed)
    name = f"t{os.getpid()}"
    # a process of a killed cluster
    environment = {nodes.MARKER: str(hosts.Cluster.named(name).folder)}
    orphan = subprocess.Popen(["/bin/sleep", "600"], env=environment)
    try:
        with hosts.started(name) as started:
            assert not Path("/proc", str(orphan.pid)).exists(), (
                "processes of a killed cluster are ended"
            )
            yield started
    except NotAllowed as reason:
        pytest.skip(f"no network namespaces here: {reason}")
    finally:
        orphan.kill()
    assert not nodes.processes(started.folder)
    remove_logs(name)
    assert not list(Path("/run/netns").glob(f"{started.network.name}-*"))


def run(cluster: hosts.Cluster, *command: str, host: str = "head") -> subprocess.CompletedProcess:
    """Runs a command on a host, as its user does."""
    with cluster.network.inside(host):
        return subprocess.run(
            command,
            cwd=ROOT,
            env=cluster.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=500,  # several times as long as on an idle machine
        )


def wait_for(condition: Callable[[], bool], failure: str, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, failure
        time.sleep(0.2)


def jobs_of(cluster: hosts.Cluster) -> dict[str, dict]:
    """The information on each submitted job, by its submission id."""
    request = urllib.request.Request(
        f"{hosts.JOBS}/api/jobs/", headers={"Authorization": f"Bearer {cluster.token}"}
    )
    with cluster.network.inside("head"), urllib.request.urlopen(request, timeout=30) as response:
        return {job["submission_id"]: job for job in json.load(response)}


@pytest.fixture(scope="module")
def checked_jobs(cluster, tmp_path_factory):
    """All jobs, submitted by `check.py` on the head: their results and its output."""
    output = tmp_path_factory.mktemp("hosts") / "check"
    script = str(ROOT / "cluster" / "check.py")
    done = run(cluster, sys.executable, script, "--output", str(output), "--run", "faces")
    assert done.returncode == 0, done.stdout
    return output, done.stdout


@pytest.mark.slow
def test_every_job_runs_on_two_hosts_under_the_name_of_its_run(cluster, checked_jobs):
    output, log = checked_jobs
    both = ", ".join(HOSTS.values())
    assert f"the workers of run 'faces' ran on {both}\n" in log
    assert "epoch 2/2: train loss" in log and f"{output}/evaluation/report.html" in log
    assert log.splitlines()[-1] == f"{output}/evaluation/metrics.parquet: 1 row"
    jobs = jobs_of(cluster)
    for job in ("prepare", "train", "tune", "predict", "evaluate"):
        info = jobs[f"faces-{job}"]
        assert info["status"] == "SUCCEEDED" and info["driver_exit_code"] == 0
        assert info["metadata"]["run"] == "faces"
    assert json.loads((output / "runs/faces/run.json").read_text())["num_workers"] == 2


@pytest.mark.slow
def test_the_check_fails_for_a_duplicate_epoch(checked_jobs):
    output, _ = checked_jobs
    history = output / "runs" / "faces" / "history.parquet"
    original = history.read_bytes()
    table = pq.read_table(history)
    try:
        pq.write_table(table.take([0, 1, 1]), history)
        with pytest.raises(JobFailed, match="duplicate values of epoch"):
            check.check_results(str(output), "faces")
    finally:
        history.write_bytes(original)
    assert check.check_results(str(output), "faces")


@pytest.mark.slow
def test_the_exit_status_of_a_job_is_that_of_its_command(cluster):
    wrong = ("python", "jobs/train.py", "--data", "/nowhere", "--epochs", "-3")
    for name, command, status in (
        ("refused", wrong, 2),
        ("broken", ("python", "-c", "raise SystemExit(7)"), 7),
    ):
        submit = (str(RAY), "job", "submit", "--working-dir", ".", "--submission-id", name, "--")
        done = run(cluster, *submit, *command)
        assert done.returncode == 1 and f"exit code {status}" in done.stdout
        info = jobs_of(cluster)[name]
        assert (info["status"], info["driver_exit_code"]) == ("FAILED", status)


@pytest.mark.slow
def test_requests_without_the_token_are_refused(cluster):
    for headers, status in (({}, 401), ({"Authorization": f"Bearer {'0' * 64}"}, 403)):
        for path in ("/api/version", "/api/jobs/", "/api/v0/nodes"):
            request = urllib.request.Request(f"{hosts.JOBS}{path}", headers=headers)
            with (
                cluster.network.inside("head"),
                pytest.raises(urllib.error.HTTPError) as refused,
            ):
                urllib.request.urlopen(request, timeout=30)
            assert refused.value.code == status, path


def ports_of(cluster: hosts.Cluster, host: str) -> list[str]:
    """The ports of a host that listen on other addresses than the loopback."""
    with cluster.network.inside(host):
        tables = [Path("/proc/thread-self/net", name).read_text() for name in ("tcp", "tcp6")]
    ports = set()
    for line in "".join(tables).splitlines():
        fields = line.split()
        address, _, port = fields[1].partition(":")
        if fields[3] == "0A" and not address.endswith("0100007F"):  # listens; 127.0.0.1
            ports.add(int(port, 16))
    return [str(port) for port in sorted(ports)]


def knock(cluster: hosts.Cluster, source: str, host: str, token: str, ports: list[str]) -> dict:
    """The answer of each port of a host to a request from the source host."""
    script = str(ROOT / "tests" / "knock.py")
    done = run(cluster, sys.executable, script, HOSTS[host], token, *ports, host=source)
    assert done.returncode == 0, done.stdout
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("token", ["", "0" * 64], ids=["none", "wrong"])
def test_every_port_of_the_hosts_but_metrics_requires_the_token(cluster, token):
    refused = {f"http {403 if token else 401}"}
    refused |= {
        f"{each} UNAUTHENTICATED" for each in ("GCS", "raylet", "worker", "client", "agent")
    }
    for host, other in (("head", "worker"), ("worker", "head")):
        ports = ports_of(cluster, host)
        answers = knock(cluster, other, host, token, ports)
        open_afterwards = ports_of(cluster, host)  # a worker may have ended
        for port, answer in answers.items():
            if answer == "closed" and port not in open_afterwards:
                continue
            assert answer in {*refused, "objects UNAUTHENTICATED", "metrics 200"}, (host, port)
        assert answers["8076"] == "objects UNAUTHENTICATED"
        assert answers["52365"] in refused
        if host == "head":
            assert "8265" not in ports, "the dashboard listens on the loopback only"
            assert (answers["6379"], answers["10001"]) == (
                "GCS UNAUTHENTICATED",
                "client UNAUTHENTICATED",
            )


@pytest.mark.slow
def test_the_outside_reaches_neither_dashboard_nor_gcs(cluster):
    for host, address in HOSTS.items():
        ports = [*map(int, ports_of(cluster, host)), 8265]
        assert len(ports) > 4
        with cluster.network.inside("outside"), ThreadPoolExecutor(len(ports)) as threads:
            assert not any(threads.map(connects, [address] * len(ports), ports))
    cluster.network.open_the_gate()  # as if the firewall was forgotten
    try:
        for token, answer in (("", "GCS UNAUTHENTICATED"), (cluster.token, "GCS OK")):
            answers = knock(cluster, "outside", "head", token, ["6379", "8265"])
            assert answers == {"6379": answer, "8265": "closed"}
    finally:
        cluster.network.close_the_gate()
    assert knock(cluster, "worker", "head", cluster.token, ["8265"]) == {"8265": "closed"}


@pytest.mark.slow
@pytest.mark.long
def test_without_namespaces_two_nodes_run_on_the_loopback_address(tmp_path):
    forbidden = tmp_path / "ip"
    forbidden.write_text("#!/bin/sh\necho 'Operation not permitted' >&2\nexit 1\n")
    forbidden.chmod(0o755)
    script = str(ROOT / "cluster" / "hosts.py")
    # submits a job, and ends with status 5
    command = ["/bin/sh", "-c", "ray job submit -- python -c 'print(6 * 7)' && exit 5"]
    name = f"t{os.getpid()}l"
    done = subprocess.run(
        [sys.executable, script, "--name", name, "--", *command],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 5, done.stdout + done.stderr
    assert (
        "namespaces cannot be created here (Operation not permitted); using two nodes"
        in done.stdout
    )
    assert "2 nodes alive, 4 CPUs" in done.stdout and "\n42\n" in done.stdout
    remove_logs(name)


class Training:
    """A submitted training of `EPOCHS` epochs with one worker on each host."""

    def __init__(self, cluster: hosts.Cluster, data: Path, folder: Path) -> None:
        self.run = folder / "interrupted"
        self._log = folder / "log"
        command = ["python", "jobs/train.py", "--data", str(data), "--storage", str(folder)]
        command += ["--run", "interrupted", "--width", "4", "--epochs", str(EPOCHS)]
        command += [
            "--global-batch-size",
            "8",
            "--batch-norm-group",
            "4",
            "--num-workers",
            "2",
            "--cpus-per-worker",
            "1.5",
        ]
        submit = [str(RAY), "job", "submit", "--working-dir", ".", "--submission-id", "interrupted"]
        submit.append("--")
        with cluster.network.inside("head"), self._log.open("w") as log:
            self._process = subprocess.Popen(
                [*submit, *command],
                cwd=ROOT,
                env=cluster.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def epochs(self) -> list[int]:
        history = self.run / "history.parquet"
        if not history.exists():
            return []
        # read at once, since it may be replaced
        return pq.read_table(io.BytesIO(history.read_bytes()))["epoch"].to_pylist()

    def reach(self, epoch: int) -> None:
        """Waits for the end of an epoch."""

        def ended() -> bool:
            assert self._process.poll() is None, self.log
            return epoch in self.epochs

        wait_for(ended, f"epoch {epoch} did not end")

    def end(self) -> int:
        return self._process.wait(timeout=300)


@pytest.mark.slow
def test_a_training_continues_after_a_host_was_disconnected(cluster, checked_jobs, tmp_path):
    training = Training(cluster, checked_jobs[0] / "faces", tmp_path)
    head, _ = both = list(HOSTS.values())
    training.reach(1)
    cluster.network.disconnect("worker")
    time.sleep(2)  # too short for the host to be declared dead
    cluster.network.reconnect("worker")
    training.reach(len(training.epochs) + 1)
    done = training.epochs
    wait_for(lambda: cluster.alive() == both, "a host was lost")
    assert "resuming after" not in training.log
    assert len(done) < EPOCHS - 1, "the training was too fast for this test"
    cluster.network.disconnect("worker")
    wait_for(lambda: cluster.alive() == [head], "the head does not declare the host dead")
    cluster.network.reconnect("worker")
    wait_for(lambda: cluster.alive() == both, "the host does not join again")
    assert training.end() == 0, training.log
    assert training.epochs == list(range(1, EPOCHS + 1))
    after = int(training.log.partition("resuming after epoch ")[2].partition("\n")[0])
    assert len(done) <= after < EPOCHS
    assert json.loads((training.run / "run.json").read_text())["epochs"] == EPOCHS
    # the README quotes both reasons for which Ray ends itself on that host
    reasons = (
        "Exiting because this node manager has mistakenly been marked as dead by the GCS",
        "GCS consider this node to be dead",
    )
    logs = [log.read_text() for log in (cluster.folder / "worker").rglob("raylet.[oe]*")]
    assert any(reason in log for log in logs for reason in reasons)
    readme = " ".join((ROOT / "cluster" / "README.md").read_text().split())
    assert all(reason in readme for reason in reasons)
