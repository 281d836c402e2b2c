"""On a cluster: the files that are uploaded, and jobs submitted to two nodes on this machine."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path

import local
import nodes
import pandas as pd
import pytest
from processes import wait_for

from fer_ray.data import predictions
from fer_ray.data.labels import FER2013_LABELS, probability_column
from fer_ray.errors import UserError
from fer_ray.sweeps.store import SweepFolder

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "cluster" / "local.py"
MIB = 2**20
IMAGES = 600


# ------------------------------------------------------------------ the uploaded files


class _JobsApi(BaseHTTPRequestHandler):
    """A head that knows no package yet, and accepts any upload and any job."""

    def do_GET(self) -> None:
        if self.path == "/api/version":
            self._respond(200, {"ray_version": version("ray"), "version": "4"})
        else:
            self._respond(404, {})

    def do_PUT(self) -> None:
        self.server.uploaded = self.rfile.read(int(self.headers["Content-Length"]))
        self._respond(200, {})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._respond(200, {"job_id": "job", "submission_id": "job"})

    def _respond(self, status: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *unused: object) -> None:
        """Nothing is logged."""


def uploaded(root: Path) -> bytes:
    """The zip that Ray uploads when a job is submitted with this working directory."""
    from ray.job_submission import JobSubmissionClient

    with ThreadingHTTPServer(("127.0.0.1", 0), _JobsApi) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = JobSubmissionClient(f"http://127.0.0.1:{server.server_address[1]}")
        client.submit_job(entrypoint="true", runtime_env={"working_dir": str(root)})
        server.shutdown()
        return server.uploaded


def names_in(archive: bytes) -> list[str]:
    return zipfile.ZipFile(io.BytesIO(archive)).namelist()


def test_the_working_directory_is_uploaded_without_data_results_and_caches():
    archive = uploaded(ROOT)
    names = names_in(archive)
    template = "fer_ray/reporting/templates/report.html.j2"
    assert {"fer_ray/cli.py", template, "jobs/train.py"} <= set(names)
    assert {name.split("/")[0] for name in names if "/" in name} == {"fer_ray", "jobs"}
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]
    assert len(archive) < MIB


def test_large_files_in_new_places_are_not_uploaded(tmp_path):
    root = tmp_path / "root"
    for name in ("fer_ray", "jobs"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ("results/reference/runs", "data", "a new folder", ".venv/lib", ".git", "tests"):
        (root / path).mkdir(parents=True)
        (root / path / "large.bin").write_bytes(bytes(2 * MIB))
    (root / "large.safetensors").write_bytes(bytes(2 * MIB))
    (root / "my-sweep.yaml").write_text("method: grid\n")
    assert len(uploaded(root)) > MIB, "large files are uploaded unless they are ignored"
    shutil.copy(ROOT / ".rayignore", root)
    shutil.copy(ROOT / ".gitignore", root)
    archive = uploaded(root)
    names = names_in(archive)
    assert len(archive) < MIB
    assert "my-sweep.yaml" in names and "fer_ray/cli.py" in names
    assert not [name for name in names if "large" in name]


# ------------------------------------------------------------------ errors of the user


def run_script(*arguments: str, **settings) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **settings)


@pytest.fixture
def short_folder():
    """A folder whose path is short enough for sockets, unlike those of pytest."""
    with tempfile.TemporaryDirectory(prefix="fer", dir="/tmp") as folder:
        yield Path(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["begin"], "'begin'"),
        (["start", "--port", "80"], "--port: '80' is not a whole number between 1024 and 65535"),
        (["start", "--prot", "7000"], "'--prot' is not one of"),
        (["start", "--port", "7000", "--client-port", "7000"], "--port: 7000 is given twice"),
        (["start", "--dir", "/tmp/" + "long" * 20], "--dir: "),
    ],
)
def test_an_error_of_the_user_is_one_line_and_status_2(arguments, message):
    done = run_script(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_a_port_in_use_and_a_folder_of_other_files_are_refused(short_folder):
    flags = argparse.Namespace(port=0, dashboard_port=1, client_port=2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        flags.port = server.getsockname()[1]
        with pytest.raises(UserError, match=f"--port: {flags.port} is in use"):
            local._check_ports(flags)
    (short_folder / "head").mkdir()
    (short_folder / "head" / "mine.txt").touch()
    with pytest.raises(UserError, match="holds other files"):
        nodes.make_private("--dir", short_folder)
    assert (short_folder / "head" / "mine.txt").exists()


def test_the_token_is_private_and_new_each_time(short_folder):
    first, second = nodes.new_token(short_folder), nodes.new_token(short_folder)
    file = short_folder / nodes.TOKEN
    assert first != second == file.read_text() and len(second) == 64
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_without_a_cluster_status_fails_and_stop_succeeds(short_folder):
    done = run_script("status", "--dir", str(short_folder))
    assert (done.returncode, done.stderr) == (
        1,
        f"local.py: no cluster is running in {short_folder}\n",
    )
    done = run_script("stop", "--dir", str(short_folder))
    assert (done.returncode, done.stdout) == (0, f"no cluster is running in {short_folder}\n")


# ------------------------------------------------------------------ jobs on two nodes


@dataclass(frozen=True)
class Cluster:
    """A cluster of two nodes that `local.py` started."""

    folder: Path
    jobs: str

    @property
    def token(self) -> str:
        return (self.folder / nodes.TOKEN).read_text()

    def submit(
        self, *command: str, flags: Sequence[str] = (), **environment: str
    ) -> subprocess.CompletedProcess:
        """Runs `ray job submit` for this project as a user does; waits for the job by default."""
        job = ["submit", "--working-dir", ".", *flags, "--", *command]
        return self.ray_job(*job, **environment)

    def ray_job(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        ray = Path(sys.executable).parent / "ray"
        return subprocess.run(
            [str(ray), "job", *arguments],
            cwd=ROOT,
            env={
                **os.environ,
                **nodes.access(self.folder),
                "RAY_API_SERVER_ADDRESS": self.jobs,
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=240,
        )

    def succeed(self, *command: str) -> str:
        done = self.submit(*command)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def state_of(self, resource: str) -> list[dict]:
        request = urllib.request.Request(
            f"{self.jobs}/api/v0/{resource}", headers={"Authorization": f"Bearer {self.token}"}
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.load(response)["data"]["result"]["result"]

    def listening(self) -> set[str]:
        """The addresses on which the cluster's processes accept connections."""
        addresses = set()
        for process in nodes.processes(self.folder):
            with contextlib.suppress(nodes.psutil().NoSuchProcess):  # it ended
                for connection in process.net_connections(kind="tcp"):
                    if connection.status == "LISTEN":
                        addresses.add(connection.laddr.ip.removeprefix("::ffff:"))
        return addresses


@pytest.fixture(scope="module")
def cluster():
    port, dashboard_port, client_port = nodes.free_ports(3)
    folder = Path(tempfile.mkdtemp(prefix="fer", dir="/tmp")) / "c"
    path = ["--dir", str(folder)]
    ports = [f"--port={port}", f"--dashboard-port={dashboard_port}", f"--client-port={client_port}"]
    try:
        done = run_script("start", *path, *ports)
        assert done.returncode == 0, done.stderr
        jobs = f"http://127.0.0.1:{dashboard_port}"
        assert f"2 nodes alive, 4 CPUs; dashboard {jobs}\n" in done.stdout
        assert f"export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={folder}/token" in done.stdout
        yield Cluster(folder, jobs)
    finally:
        stopped = run_script("stop", *path)
        remaining = [process.pid for process in nodes.processes(folder)]
        has_token = (folder / nodes.TOKEN).exists()
        shutil.rmtree(folder.parent, ignore_errors=True)
    assert stopped.returncode == 0, stopped.stderr
    assert not remaining and not has_token


@pytest.mark.slow
def test_prepare_train_predict_and_evaluate_on_two_nodes(cluster, tmp_path):
    data, runs, results = (str(tmp_path / name) for name in ("faces", "runs", "predictions"))
    prepare = ["--source", "synthetic", "--num-images", str(IMAGES), "--output", data]
    cluster.succeed("python", "jobs/prepare.py", *prepare)
    train = ["--data", data, "--storage", runs, "--run", "both", "--model", "custom_cnn"]
    train += ["--width", "8", "--epochs", "1", "--global-batch-size", "64"]
    # more than half of a node's two CPUs: one worker on each node
    train += ["--num-workers", "2", "--cpus-per-worker", "1.5"]
    log = cluster.succeed("python", "jobs/train.py", *train)
    assert "epoch 1/1: train loss" in log and "Traceback" not in log
    predict = ["--checkpoint", f"{runs}/both", "--data", data, "--split", "validation", "test"]
    cluster.succeed("python", "jobs/predict.py", *predict, "--output", results)
    evaluate = ["--predictions", results, "--runs", runs, "--data", data]
    log = cluster.succeed(
        "python", "jobs/evaluate.py", *evaluate, "--output", str(tmp_path / "evaluation")
    )
    assert f"{tmp_path}/evaluation/report.html" in log

    workers = [a for a in cluster.state_of("actors") if a["class_name"] == "RayTrainWorker"]
    assert len(workers) == 2 and len({worker["node_id"] for worker in workers}) == 2
    assert cluster.listening() == {"127.0.0.1"}, "after a training too"
    check_results(tmp_path)


def check_results(path: Path) -> None:
    counts = json.loads((path / "faces" / "dataset.json").read_text())["splits"]
    assert sum(split["rows"] for split in counts.values()) == IMAGES
    for split in ("validation", "test"):
        frame = predictions.read(f"{path}/predictions/both/{split}").table.to_pandas()
        prepared = pd.read_parquet(path / "faces" / split)
        assert sorted(frame["image_id"]) == sorted(prepared["image_id"])
        assert frame["image_id"].is_unique and len(frame) == counts[split]["rows"]
        assert frame["error"].isna().all()
        columns = [probability_column(label) for label in FER2013_LABELS]
        assert frame[columns].sum(axis=1).sub(1).abs().max() < 1e-5
    metrics = pd.read_parquet(path / "evaluation" / "metrics.parquet")
    assert sorted(zip(metrics["run"], metrics["split"])) == [
        ("both", "test"),
        ("both", "validation"),
    ]
    assert json.loads((path / "runs" / "both" / "run.json").read_text())["num_workers"] == 2


SEARCH = """
method = "search"
space.optimizer.learning_rate = { low = 0.001, high = 0.2, log = true }
"""


@pytest.mark.slow
@pytest.mark.long
def test_a_stopped_sweep_resumes_when_it_is_submitted_again(cluster, tmp_path):
    """No result is lost and no epoch is trained twice, with trials on both nodes."""
    data, sweeps = str(tmp_path / "faces"), str(tmp_path / "sweeps")
    prepare = ["--source", "synthetic", "--num-images", "300", "--output", data]
    cluster.succeed("python", "jobs/prepare.py", *prepare)
    (tmp_path / "searched.toml").write_text(SEARCH)
    tune = ["python", "jobs/tune.py", "--data", data, "--storage", sweeps]
    tune += ["--sweep", str(tmp_path / "searched.toml"), "--num-trials", "6", "--epochs", "9"]
    tune += ["--width", "4", "--global-batch-size", "16", "--cpus-per-worker", "2"]
    done = cluster.submit(*tune, flags=["--no-wait", "--submission-id", "stopped-sweep"])
    assert done.returncode == 0, done.stdout
    # a promoted trial is between two rungs
    trials = tmp_path / "sweeps/searched/trials"
    wait_for(lambda: any(trials.glob("*/checkpoint_000002/checkpoint.json")))
    done = cluster.ray_job("stop", "stopped-sweep")
    assert done.returncode == 0 and "stopped" in done.stdout, done.stdout
    before = SweepFolder(f"{sweeps}/searched").trials()
    assert not all(trial.is_over for trial in before), "too late to show anything"

    log = cluster.succeed(*tune)
    assert "2 at once" in log and "epochs of the others are done" in log
    rows = SweepFolder(f"{sweeps}/searched").read_table()
    assert rows["trial"].nunique() == 6 and not rows.duplicated(["trial", "epoch"]).any()
    assert set(rows["status"]) == {"finished", "stopped"}
    for trial in before:
        seconds = rows[rows["trial"] == trial.number]["seconds"].tolist()
        assert seconds[: len(trial.history)] == [row["seconds"] for row in trial.history]


@pytest.mark.slow
def test_a_wrong_flag_fails_the_job_with_one_line(cluster):
    done = cluster.submit("python", "jobs/train.py", "--data", "/nowhere", "--epochs", "-3")
    assert done.returncode != 0
    assert "train.py: --epochs: -3 is not from 1 to 100000; the nearest" in done.stdout
    assert "exit code 2" in done.stdout and "Traceback" not in done.stdout


PROBE = """
import ray, sys, fer_ray, fer_ray.cli
fer_ray.cli.start_ray()
@ray.remote(num_cpus=1.5)
def there():
    import fer_ray, time
    time.sleep(1)  # the second task must start on the other node meanwhile
    return ray.get_runtime_context().get_node_id(), fer_ray.__file__
print("driver", sys.executable, fer_ray.__file__)
for node, file in ray.get([there.remote(), there.remote()]):
    print("worker", node, file)
"""


@pytest.mark.slow
def test_driver_and_workers_import_the_uploaded_copy(cluster):
    lines = cluster.succeed("python", "-c", PROBE).splitlines()
    (driver,) = [line.split()[1:] for line in lines if line.startswith("driver ")]
    workers = [line.split()[1:] for line in lines if line.startswith("worker ")]
    assert driver[0] == sys.executable
    assert len({node for node, _ in workers}) == 2
    for file in (driver[1], *(file for _, file in workers)):
        assert file.startswith(str(cluster.folder)) and "/_ray_pkg_" in file


@pytest.mark.slow
def test_requests_without_the_token_are_refused(cluster):
    for headers, status in (({}, 401), ({"Authorization": f"Bearer {'0' * 64}"}, 403)):
        for path in ("/api/version", "/api/jobs/", "/api/v0/nodes"):
            request = urllib.request.Request(f"{cluster.jobs}{path}", headers=headers)
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(request, timeout=30)
            assert refused.value.code == status, path
    before = len(cluster.state_of("jobs"))
    wrong = {"RAY_AUTH_TOKEN_PATH": "", "RAY_AUTH_TOKEN": "0" * 64}
    done = cluster.submit("python", "-c", "print('ran')", **wrong)
    assert done.returncode != 0 and "Invalid authentication token" in done.stdout
    assert len(cluster.state_of("jobs")) == before


@pytest.mark.slow
def test_every_port_listens_on_the_loopback_address_only(cluster):
    assert cluster.listening() == {"127.0.0.1"}
    assert stat.S_IMODE(cluster.folder.stat().st_mode) == 0o700


@pytest.mark.slow
def test_a_second_start_is_refused_and_status_shows_how_to_use_the_first(cluster):
    done = run_script("start", "--dir", str(cluster.folder))
    assert done.returncode == 2 and "a cluster is running in" in done.stderr
    done = run_script("status", "--dir", str(cluster.folder))
    assert done.returncode == 0 and f"RAY_API_SERVER_ADDRESS={cluster.jobs}" in done.stdout
