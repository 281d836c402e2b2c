"""The nodes of a Ray cluster as processes of this machine: their folder, their token, their end."""

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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fer_ray.errors import JobFailed, UserError
from fer_ray.runtime import resources

MARKER = "FER_RAY_LOCAL_CLUSTER"
"""Environment variable of every process of a cluster, job drivers included: its folder."""

STATE, TOKEN = "cluster.json", "token"
NODES = ("head", "worker")
LOOPBACK = "127.0.0.1"
_STOP_S = 5.0
"""How long a node may take to end itself; after Ray Data one would wait 30 s for its actors."""
_LONGEST_SOCKET = len("/worker/session_2026-01-01_00-00-00_000000_4194304/sockets/dash_MetricsHead")


def processes(folder: Path) -> list[Any]:
    """The processes of the cluster in a folder (`psutil.Process`), found by their environment.

    Ray titles its workers anew and gives job drivers sessions of their own, so that neither
    command lines nor process groups find all of them.
    """
    library = psutil()
    found = []
    for process in library.process_iter():
        with contextlib.suppress(library.Error, OSError):
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


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody has, and that the kernel gives nobody who asks for any.

    Those it gives away (from 32768 on) may be taken again before whoever asked here listens.

    Raises:
        JobFailed: where there are not so many.
    """
    found: list[int] = []
    for port in random.sample(range(20_000, 32_768), 1000):
        with contextlib.suppress(OSError), socket.create_server((LOOPBACK, port)):
            found.append(port)
        if len(found) == count:
            return found
    raise JobFailed(f"there are no {count} free ports below 32768")


def psutil() -> Any:
    """The library that Ray brings."""
    importlib.import_module("ray")  # puts the psutil that it brings on the path
    return importlib.import_module("psutil")


def listens(port: int) -> bool:
    """Whether something on the loopback accepts connections."""
    with socket.socket() as probe:
        return probe.connect_ex((LOOPBACK, port)) == 0


def make_private(flag: str, folder: Path) -> None:
    """Makes the folder, for this user only, and removes what an earlier cluster left there.

    Raises:
        UserError: which begins with the flag that gave the folder, where it cannot be one.
    """
    room = 107 - _LONGEST_SOCKET
    if len(os.fsencode(folder)) > room:
        raise UserError(f"{flag}: {folder} is too long for socket names: at most {room} characters")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
        (folder / STATE).touch()
    found = folder.lstat()
    if folder.is_symlink() or not folder.is_dir() or found.st_uid != os.getuid():
        raise UserError(f"{flag}: {folder} is not a folder of yours; give another")
    if any(folder.iterdir()) and not (folder / STATE).exists():
        raise UserError(f"{flag}: {folder} holds other files; give an empty or a new folder")
    folder.chmod(0o700)
    for name in NODES:
        shutil.rmtree(folder / name, ignore_errors=True)


def new_token(folder: Path) -> str:
    """Writes a fresh token into a file that only this user can read."""
    token = secrets.token_hex(32)  # as `ray get-auth-token --generate` makes them
    (folder / TOKEN).unlink(missing_ok=True)
    descriptor = os.open(folder / TOKEN, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(token)  # without an end of line: Ray would take it for a part of the token
    return token


def environment(folder: Path, jobs: str) -> dict[str, str]:
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
        resources.MAXIMUM: resources.FIXED,  # jobs refuse what the nodes cannot provide
        # `python` in a job's command is the one that runs this
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
    }


def access(folder: Path) -> dict[str, str]:
    """The environment that lets Ray's commands in."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / TOKEN)}


def command(folder: Path, name: str, *, cpus: int, object_store_mb: int) -> list[str]:
    """`ray start` of a node that stays in the foreground, as far as all nodes have it alike."""
    return [
        *(str(Path(sys.executable).parent / "ray"), "start", "--block", "--disable-usage-stats"),
        f"--temp-dir={folder / name}",
        f"--num-cpus={cpus}",
        f"--object-store-memory={object_store_mb * 2**20}",
    ]


def spawn(
    folder: Path, name: str, command: Sequence[str], environment: Mapping[str, str]
) -> subprocess.Popen:
    """Starts a node, in the network of this thread; what it prints goes to ``<name>.log``."""
    with (folder / f"{name}.log").open("w") as log:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # an interrupt of this command is not one of the node
        )


def wait(folder: Path, nodes: Mapping[str, subprocess.Popen], deadline: float, ready: Any) -> None:
    """Waits until something is so.

    Raises:
        JobFailed: where a node ends before, or it takes too long.
    """
    while not ready():
        for name, process in nodes.items():
            if process.poll() is not None:
                log = folder / f"{name}.log"
                last = log.read_text().strip().rpartition("\n")[2]
                raise JobFailed(f"the {name} node ended: {last} (see {log})")
        if time.monotonic() > deadline:
            raise JobFailed(f"--wait-s: the nodes were not alive in time; see the logs in {folder}")
        time.sleep(0.5)


def end(folder: Path) -> int:
    """Ends the processes of the cluster, its nodes first; returns how many there were."""
    library = psutil()
    found = processes(folder)
    # `ray start --block` ends its node in order, a worker only while its head still answers;
    # what is left then gets no such courtesy
    for role in ("--address=", "--head"):
        for process in found:
            with contextlib.suppress(library.Error):
                arguments = process.cmdline()
                if "--block" in arguments and any(one.startswith(role) for one in arguments):
                    process.terminate()
                    process.wait(_STOP_S)
    left = processes(folder)
    while left:
        for process in left:
            with contextlib.suppress(library.Error):
                process.kill()
        library.wait_procs(left, timeout=_STOP_S)
        left = processes(folder)
    (folder / TOKEN).unlink(missing_ok=True)
    return len(found)
