"""The nodes of a Ray cluster as processes of this machine: folder, token, start and end."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fer_ray.errors import JobFailed, UserError
from fer_ray.runtime import resources

MARKER = "FER_RAY_LOCAL_CLUSTER"
"""Environment variable of every process of a cluster, job drivers included. Its value is the
cluster's folder."""

STATE, TOKEN = "cluster.json", "token"
NODES = ("head", "worker")
LOOPBACK = "127.0.0.1"
_STOP_S = 5.0
"""Seconds for a node to end in order, then it is killed: after Ray Data it would take 30 s."""
_MAX_SOCKET_PATH = 107
"""Characters that Linux allows for the path of a socket."""
_LONGEST_SOCKET_NAME = len(
    "/worker/session_2026-01-01_00-00-00_000000_4194304/sockets/dash_MetricsHead"
)


def processes(folder: Path) -> list[Any]:
    """The processes of the cluster in a folder (`psutil.Process`).

    They are identified by their environment: Ray starts job drivers in other process groups.
    """
    library = psutil()
    members = []
    for process in library.process_iter():
        with contextlib.suppress(library.Error, OSError):
            if process.environ().get(MARKER) == str(folder) and process.pid != os.getpid():
                members.append(process)
    return members


def alive(jobs: str, token: str) -> list[dict[str, Any]]:
    """The living nodes from Ray's state API; an empty list while it does not answer."""
    request = urllib.request.Request(
        f"{jobs}/api/v0/nodes", headers={"Authorization": f"Bearer {token}"}
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=10) as response:
            nodes = json.load(response)["data"]["result"]["result"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [node for node in nodes if node["state"] == "ALIVE"]


def free_ports(count: int) -> list[int]:
    """Free ports of the loopback address, from 20000 to 32767.

    The kernel itself assigns ports from 32768 on. Such a port could be assigned to another
    process before the caller listens on it.

    Raises:
        JobFailed: if there are too few free ports.
    """
    ports: list[int] = []
    for port in random.sample(range(20_000, 32_768), 1000):
        with contextlib.suppress(OSError), socket.create_server((LOOPBACK, port)):
            ports.append(port)
        if len(ports) == count:
            return ports
    raise JobFailed(f"fewer than {count} ports from 20000 to 32767 are free")


def psutil() -> Any:
    """The psutil library that Ray includes."""
    importlib.import_module("ray")  # adds the psutil that it includes to the path
    return importlib.import_module("psutil")


def listens(port: int) -> bool:
    """Whether something accepts connections at a port of the loopback address."""
    with socket.socket() as probe:
        return probe.connect_ex((LOOPBACK, port)) == 0


def make_private(flag: str, folder: Path) -> None:
    """Creates the cluster's folder with access for this user only, and removes an earlier cluster.

    Args:
        flag: the flag that names the folder, for error messages.
        folder: absolute path.

    Raises:
        UserError: if the folder cannot be used.
    """
    room = _MAX_SOCKET_PATH - _LONGEST_SOCKET_NAME
    if len(os.fsencode(folder)) > room:
        raise UserError(
            f"{flag}: {folder} is too long for socket names; give a path of at most {room} "
            "characters"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
        (folder / STATE).touch()
    status = folder.lstat()
    if folder.is_symlink() or not folder.is_dir() or status.st_uid != os.getuid():
        raise UserError(f"{flag}: {folder} is not a folder that you own; give another")
    if any(folder.iterdir()) and not (folder / STATE).exists():
        raise UserError(f"{flag}: {folder} holds other files; give an empty or a new folder")
    folder.chmod(0o700)
    for name in NODES:
        shutil.rmtree(folder / name, ignore_errors=True)


def new_token(folder: Path) -> str:
    """Writes a new token into a file that only this user can read, and returns it."""
    token = secrets.token_hex(32)  # the format of `ray get-auth-token --generate`
    (folder / TOKEN).unlink(missing_ok=True)
    descriptor = os.open(folder / TOKEN, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(token)  # without a newline: Ray would read it as part of the token
    return token


def environment(folder: Path, jobs: str) -> dict[str, str]:
    """The environment of a node, which its workers and jobs inherit."""
    # the first three would lead to another cluster; `uv run` sets the hook, which would build an
    # environment for each worker
    removed = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_RUNTIME_ENV_HOOK")
    kept = {key: value for key, value in os.environ.items() if key not in removed}
    return {
        **kept,
        **access(folder),
        MARKER: str(folder),
        # Ray Train queries the dashboard; without the address it would guess the cluster
        "RAY_API_SERVER_ADDRESS": jobs,
        resources.MAXIMUM: resources.FIXED,  # jobs refuse what the nodes cannot provide
        # `python` in a job's command is this Python
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
    }


def access(folder: Path) -> dict[str, str]:
    """The environment variables with which Ray's commands are authorized."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / TOKEN)}


def command(folder: Path, name: str, *, cpus: int, object_store_mb: int) -> list[str]:
    """`ray start` in the foreground, with the arguments that all nodes share."""
    return [
        *(str(Path(sys.executable).parent / "ray"), "start", "--block", "--disable-usage-stats"),
        f"--temp-dir={folder / name}",
        f"--num-cpus={cpus}",
        f"--object-store-memory={object_store_mb * 2**20}",
    ]


def spawn(
    folder: Path, name: str, command: Sequence[str], environment: Mapping[str, str]
) -> subprocess.Popen:
    """Starts a node in the network namespace of this thread; its output goes to ``<name>.log``."""
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # an interrupt of this command must not reach the node
        )
    _pid_file(folder, name).write_text(str(process.pid))
    return process


def _pid_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.pid"


def wait(
    folder: Path, nodes: Mapping[str, subprocess.Popen], deadline: float, ready: Callable[[], bool]
) -> None:
    """Waits until `ready()` is true.

    Args:
        folder: the cluster's.
        nodes: the running nodes by name.
        deadline: of `time.monotonic`.
        ready: the condition.

    Raises:
        JobFailed: if a node ends or the deadline passes before.
    """
    while not ready():
        for name, process in nodes.items():
            if process.poll() is not None:
                log = folder / f"{name}.log"
                last = log.read_text().strip().rpartition("\n")[2]
                raise JobFailed(f"the {name} node ended: {last} (see {log})")
        if time.monotonic() > deadline:
            raise JobFailed(
                f"the nodes were not alive in time; see the logs in {folder}, or give a longer "
                "--wait-s"
            )
        time.sleep(0.5)


def end(folder: Path) -> int:
    """Ends the processes of the cluster, its nodes first; returns the number of processes."""
    library = psutil()
    members = {process.pid: process for process in processes(folder)}
    # A node ends in order when it is terminated, a worker only while its head still answers.
    for name in reversed(NODES):
        with contextlib.suppress(library.Error, OSError, ValueError, KeyError):
            node = members[int(_pid_file(folder, name).read_text())]
            node.terminate()
            node.wait(_STOP_S)
    while remaining := processes(folder):
        for process in remaining:
            with contextlib.suppress(library.Error):
                process.kill()
        library.wait_procs(remaining, timeout=_STOP_S)
    (folder / TOKEN).unlink(missing_ok=True)
    return len(members)
