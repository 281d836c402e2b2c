""".venv/bin/python cluster/local.py start

Starts a Ray cluster of two nodes, a head and a worker, on this machine: every port listens on
127.0.0.1 only and wants a token. `status` shows it, `stop` ends it and nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fer_ray import cli
from fer_ray.errors import JobFailed, UserError

MARKER = "FER_RAY_LOCAL_CLUSTER"
"""Environment variable of every process of a cluster, job drivers included: its folder."""

STATE, TOKEN = "cluster.json", "token"
NODES = ("head", "worker")
_EXAMPLE = """.venv/bin/ray job submit --working-dir . -- python jobs/train.py \\
    --data "$PWD/data/faces" --storage "$PWD/results/runs" --cpus-per-worker 1.5"""
_LOOPBACK = "127.0.0.1"
_STOP_S = 5.0
"""How long a node may take to end itself; after Ray Data one would wait 30 s for its actors."""
_LONGEST_SOCKET = len("/worker/session_2026-01-01_00-00-00_000000_4194304/sockets/dash_MetricsHead")


def main() -> None:
    """Parses, checks, and starts, shows or stops."""
    parser = cli.JobParser(prog="local.py", description=__doc__.partition("\n\n")[2])
    add = parser.add_argument
    add("command", choices=("start", "status", "stop"), help="what to do")
    port = cli.integer(1024, 65535)
    add("--port", type=port, default=6389, help="of the head's control service (GCS)")
    add("--dashboard-port", type=port, default=8275, help="of the dashboard and its Jobs API")
    add("--client-port", type=port, default=20011, help="of Ray Client, which Ray starts besides")
    add("--cpus-per-node", type=cli.integer(1), default=2, help="CPUs that each node offers")
    add("--object-store-mb", type=cli.integer(80), default=512, help="shared memory of each node")
    add("--wait-s", type=cli.integer(1), default=180, help="how long to wait for both nodes")
    add(
        "--dir",
        default=f"/tmp/fer_ray-{os.getuid()}",
        help="folder of the token, the logs and Ray's files: another one for a second cluster",
    )
    flags = parser.parse_args()
    folder = Path(flags.dir).expanduser().absolute()
    {"start": start, "status": status, "stop": stop}[flags.command](folder, flags)


def start(folder: Path, flags: argparse.Namespace) -> None:
    """Starts both nodes, waits until they are alive, and prints what to paste."""
    if processes(folder):
        raise UserError(f"--dir: a cluster runs in {folder}; stop it first, or give another folder")
    _check_ports(flags)
    _make_private(folder)
    token = _new_token(folder)
    jobs = f"http://{_LOOPBACK}:{flags.dashboard_port}"
    (folder / STATE).write_text(json.dumps({"jobs": jobs}))
    cli.say(f"starting two nodes; logs in {folder}")
    deadline = time.monotonic() + flags.wait_s
    try:
        head = _spawn(folder, "head", _head_command(folder, flags), jobs)
        _wait(folder, {"head": head}, deadline, lambda: _listens(flags.port))
        worker = _spawn(folder, "worker", _worker_command(folder, flags), jobs)
        both = {"head": head, "worker": worker}
        _wait(folder, both, deadline, lambda: len(alive(jobs, token)) == len(NODES))
    except BaseException:
        _end(folder)
        raise
    _show(folder, jobs, token)


def status(folder: Path, flags: argparse.Namespace) -> None:
    """Prints the living nodes and how to use them; fails where there are none."""
    if not processes(folder) or not (folder / STATE).exists():
        raise JobFailed(f"no cluster runs in {folder}")
    state = json.loads((folder / STATE).read_text())
    _show(folder, state["jobs"], (folder / TOKEN).read_text())


def stop(folder: Path, flags: argparse.Namespace) -> None:
    """Ends every process of this cluster and removes its token; the logs stay."""
    ended = _end(folder)
    cli.say(f"ended {ended} processes of {folder}" if ended else f"no cluster runs in {folder}")


def processes(folder: Path) -> list[Any]:
    """The processes of the cluster in a folder (`psutil.Process`), found by their environment.

    Ray titles its workers anew and gives job drivers sessions of their own, so that neither
    command lines nor process groups find all of them.
    """
    psutil = _psutil()
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARKER) == str(folder) and process.pid != os.getpid():
                found.append(process)
    return found


def alive(jobs: str, token: str) -> list[dict[str, Any]]:
    """The living nodes as Ray's state API has them; none where it does not answer."""
    request = urllib.request.Request(
        f"{jobs}/api/v0/nodes", headers={"Authorization": f"Bearer {token}"}
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=10) as answer:
            nodes = json.load(answer)["data"]["result"]["result"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [node for node in nodes if node["state"] == "ALIVE"]


def _psutil() -> Any:
    importlib.import_module("ray")  # puts the psutil that it brings on the path
    return importlib.import_module("psutil")


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((_LOOPBACK, port)) == 0


def _check_ports(flags: argparse.Namespace) -> None:
    ports = {name: getattr(flags, name) for name in ("port", "dashboard_port", "client_port")}
    for name, port in ports.items():
        flag = f"--{name.replace('_', '-')}"
        if list(ports.values()).count(port) > 1:
            raise UserError(f"{flag}: {port} is given to two flags; each needs its own")
        if _listens(port):
            raise UserError(f"{flag}: {port} is in use; give another port")


def _make_private(folder: Path) -> None:
    """Makes the folder, for this user only, and removes what an earlier cluster left there."""
    room = 107 - _LONGEST_SOCKET
    if len(os.fsencode(folder)) > room:
        raise UserError(f"--dir: {folder} is too long for socket names: at most {room} characters")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
        (folder / STATE).touch()
    found = folder.lstat()
    if folder.is_symlink() or not folder.is_dir() or found.st_uid != os.getuid():
        raise UserError(f"--dir: {folder} is not a folder of yours; give another")
    if any(folder.iterdir()) and not (folder / STATE).exists():
        raise UserError(f"--dir: {folder} holds other files; give an empty or a new folder")
    folder.chmod(0o700)
    for name in NODES:
        shutil.rmtree(folder / name, ignore_errors=True)


def _new_token(folder: Path) -> str:
    """Writes a fresh token into a file that only this user can read."""
    token = secrets.token_hex(32)  # as `ray get-auth-token --generate` makes them
    (folder / TOKEN).unlink(missing_ok=True)
    descriptor = os.open(folder / TOKEN, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(token)  # without an end of line: Ray would take it for a part of the token
    return token


def _head_command(folder: Path, flags: argparse.Namespace) -> list[str]:
    return [
        *("--head", f"--port={flags.port}"),
        *(f"--dashboard-host={_LOOPBACK}", f"--dashboard-port={flags.dashboard_port}"),
        f"--ray-client-server-port={flags.client_port}",
        *_common(folder / "head", flags),
    ]


def _worker_command(folder: Path, flags: argparse.Namespace) -> list[str]:
    # Ray would replace "127.0.0.1" and "localhost" by an address that other machines reach,
    # where the head does not listen; it lets this spelling of the same name pass.
    return [f"--address=LOCALHOST:{flags.port}", "--num-gpus=0", *_common(folder / "worker", flags)]


def _common(temporary: Path, flags: argparse.Namespace) -> list[str]:
    return [
        *("--block", "--disable-usage-stats", f"--temp-dir={temporary}"),
        f"--num-cpus={flags.cpus_per_node}",
        f"--object-store-memory={flags.object_store_mb * 2**20}",
        # any free ports: the defaults are the same for both nodes and for other clusters here
        *("--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"),
    ]


def environment(folder: Path, name: str, jobs: str) -> dict[str, str]:
    """The environment of a node, and so of its workers and jobs."""
    # the hook of `uv run` would build an environment for each worker; the rest names clusters
    foreign = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_RUNTIME_ENV_HOOK")
    kept = {key: value for key, value in os.environ.items() if key not in foreign}
    return {
        **kept,
        **access(folder),
        MARKER: str(folder),
        # Ray Train's helpers ask the dashboard for the state and would guess which
        "RAY_API_SERVER_ADDRESS": jobs,
        # `python` in a job's command is the one that runs this
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        # "0" is what makes the head, and the jobs on it, use the loopback address, on Linux
        # too; with it a worker would not be let in
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0" if name == "head" else "1",
    }


def access(folder: Path) -> dict[str, str]:
    """The environment that lets Ray's commands in."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / TOKEN)}


def _spawn(folder: Path, name: str, arguments: list[str], jobs: str) -> subprocess.Popen:
    ray = Path(sys.executable).parent / "ray"
    with (folder / f"{name}.log").open("w") as log:
        return subprocess.Popen(
            [str(ray), "start", *arguments],
            env=environment(folder, name, jobs),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # an interrupt of this command is not one of the node
        )


def _wait(folder: Path, nodes: Mapping[str, subprocess.Popen], deadline: float, ready: Any) -> None:
    while not ready():
        for name, process in nodes.items():
            if process.poll() is not None:
                log = folder / f"{name}.log"
                last = log.read_text().strip().rpartition("\n")[2]
                raise JobFailed(f"the {name} node ended: {last} (see {log})")
        if time.monotonic() > deadline:
            raise JobFailed(f"--wait-s: the nodes were not alive in time; see the logs in {folder}")
        time.sleep(0.5)


def _end(folder: Path) -> int:
    """Ends the processes of the cluster, its nodes first; returns how many there were."""
    psutil = _psutil()
    found = processes(folder)
    # `ray start --block` ends its node in order, a worker only while its head still answers;
    # what is left then gets no such courtesy
    for role in ("--address=", "--head"):
        for process in found:
            with contextlib.suppress(psutil.Error):
                arguments = process.cmdline()
                if "--block" in arguments and any(one.startswith(role) for one in arguments):
                    process.terminate()
                    process.wait(_STOP_S)
    left = processes(folder)
    while left:
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=_STOP_S)
        left = processes(folder)
    (folder / TOKEN).unlink(missing_ok=True)
    return len(found)


def _show(folder: Path, jobs: str, token: str) -> None:
    nodes = alive(jobs, token)
    cpus = sum(node["resources_total"].get("CPU", 0) for node in nodes)
    exports = {**access(folder), "RAY_API_SERVER_ADDRESS": jobs}
    settings = " ".join(f"{key}={shlex.quote(value)}" for key, value in exports.items())
    cli.say(f"{len(nodes)} nodes alive, {cpus:g} CPUs; dashboard {jobs}")
    cli.say(f"\nexport {settings}\n{_EXAMPLE}")


if __name__ == "__main__":
    cli.run(main)
