""".venv/bin/python cluster/hosts.py -- .venv/bin/python cluster/check.py --output /tmp/check

Starts a Ray cluster of two hosts on this machine, runs a command on its head, and ends the cluster.
The hosts are network namespaces (network.py). If these are not allowed, the reason is logged, and
two nodes on the loopback address (local.py) are used instead. The command's environment authorizes
Ray's commands.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import local
import network
import nodes
from network import HOSTS, Network

from fer_ray import cli, storage
from fer_ray.errors import UserError

JOBS = f"http://{nodes.LOOPBACK}:8265"
"""Address of the Jobs API, on the head."""
HEAD = ("--head", "--port=6379", "--dashboard-host=127.0.0.1", "--dashboard-port=8265")
WORKER = (f"--address={HOSTS['head']}:6379",)
BOTH = ("--object-manager-port=8076",)
"""Arguments of `ray start`, as in `on_premise.yaml`."""

HEALTH = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "5",
}
"""Environment of the head: after five failed checks in a row, at most 15 s, a host counts as dead.
By default Ray waits 3 s between checks and 10 s for each, so that it takes up to 65 s."""
_RESTART = """trap 'kill $!; wait; exit' TERM; while :; do "$@" & wait $!; sleep 1; done"""
"""Restarts a node when it ends, and ends it on SIGTERM. A node that was declared dead ends itself
when it is connected again."""


def main() -> None:
    """Starts the cluster, runs the command, and ends both."""
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    arguments, command = sys.argv[1:at], sys.argv[at + 1 :]
    parser = cli.JobParser(prog="hosts.py", description=__doc__.partition("\n\n")[2])
    add = parser.add_argument
    add(
        "--name", default="hosts", help="name of the cluster, its namespaces and its folder in /tmp"
    )
    add("--cpus-per-node", type=cli.integer(1), default=2, help="CPUs that each host offers")
    add("--wait-s", type=cli.integer(1), default=180, help="seconds to wait for both nodes")
    flags = parser.parse_args(arguments)
    if not command:
        parser.error("give a command to run on the head after --")
    storage.check_name("--name", flags.name)
    for number in (signal.SIGTERM, signal.SIGHUP):  # the cluster is ended first
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    sys.exit(_run(command, flags.name, cpus=flags.cpus_per_node, wait_s=flags.wait_s))


def _run(command: Sequence[str], name: str, *, cpus: int, wait_s: float) -> int:
    try:
        with started(name, cpus=cpus, wait_s=wait_s) as cluster, cluster.network.inside("head"):
            return _follow(command, cluster.environment)
    except network.NotAllowed as reason:
        cli.log(
            f"network namespaces cannot be created here ({reason}); using two nodes on the "
            "loopback address instead"
        )
    with _on_loopback(name, cpus=cpus, wait_s=wait_s) as environment:
        return _follow(command, environment)


def _follow(command: Sequence[str], environment: dict[str, str]) -> int:
    try:
        return subprocess.run(command, env=environment, check=False).returncode
    except FileNotFoundError as error:
        raise UserError(f"{command[0]}: command not found") from error


@dataclass(frozen=True)
class Cluster:
    """A cluster of two hosts."""

    folder: Path
    network: Network

    @classmethod
    def named(cls, name: str) -> Cluster:
        """The cluster with a name, running or not."""
        return cls(_folder(name), Network(f"fer-{name}"))

    @property
    def token(self) -> str:
        """The token that requests must carry."""
        return (self.folder / nodes.TOKEN).read_text()

    @property
    def environment(self) -> dict[str, str]:
        """Environment of a command on the head; the command is ended with the cluster."""
        return nodes.environment(self.folder, JOBS)

    def alive(self) -> list[str]:
        """Addresses of the nodes that are alive for the head, sorted."""
        with self.network.inside("head"):
            return sorted(node["node_ip"] for node in nodes.alive(JOBS, self.token))

    def clear(self) -> None:
        """Ends its processes, and removes its hosts."""
        nodes.end(self.folder)
        self.network.remove()


@contextlib.contextmanager
def started(name: str, *, cpus: int = 2, wait_s: float = 180) -> Iterator[Cluster]:
    """A cluster of two hosts that runs within the block.

    What a killed cluster of the same name left behind is removed first.

    Raises:
        NotAllowed: if network namespaces cannot be created.
        UserError: if a cluster of that name is running.
        JobFailed: if the nodes do not start.
    """
    cluster = Cluster.named(name)
    with _locked(cluster.folder):
        try:
            cluster.clear()
            cluster.network.create()
            nodes.make_private("--name", cluster.folder)
            nodes.new_token(cluster.folder)
            cli.log(f"starting a head on {HOSTS['head']} and a worker on {HOSTS['worker']}")
            _start(cluster, cpus, time.monotonic() + wait_s)
            cli.log(f"both are alive; logs in {cluster.folder}")
            yield cluster
        finally:
            cluster.clear()


def _folder(name: str) -> Path:
    return Path(f"/tmp/fer_ray-{name}-{os.getuid()}")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds a lock, which the kernel releases when this process ends for any reason."""
    with Path(f"{folder}.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"--name: a cluster is running in {folder}; give another name"
            ) from error
        yield


def _start(cluster: Cluster, cpus: int, deadline: float) -> None:
    folder, environment = cluster.folder, cluster.environment
    with cluster.network.inside("head"):
        command = [*_command(folder, "head", cpus), *HEAD, *BOTH]
        head = nodes.spawn(folder, "head", command, {**environment, **HEALTH})
        nodes.wait(folder, {"head": head}, deadline, lambda: nodes.listens(6379))
    with cluster.network.inside("worker"):
        command = [
            "sh",
            "-c",
            _RESTART,
            "restart",
            *_command(folder, "worker", cpus),
            *WORKER,
            *BOTH,
        ]
        nodes.spawn(folder, "worker", command, environment)
    nodes.wait(folder, {"head": head}, deadline, lambda: len(cluster.alive()) == len(HOSTS))


def _command(folder: Path, host: str, cpus: int) -> list[str]:
    address = f"--node-ip-address={HOSTS[host]}"
    return [*nodes.command(folder, host, cpus=cpus, object_store_mb=512), address]


@contextlib.contextmanager
def _on_loopback(name: str, *, cpus: int, wait_s: float) -> Iterator[dict[str, str]]:
    """Two nodes of `local.py` on free ports; yields the environment of a command for them."""
    folder = _folder(name)
    port, dashboard_port, client_port = nodes.free_ports(3)
    ports = [f"--port={port}", f"--dashboard-port={dashboard_port}", f"--client-port={client_port}"]
    others = [f"--dir={folder}", f"--cpus-per-node={cpus}", f"--wait-s={wait_s:g}"]
    flags = local.parser().parse_args([*ports, *others])
    with _locked(folder):
        try:
            nodes.end(folder)
            local.start(folder, flags)
            yield nodes.environment(folder, f"http://{nodes.LOOPBACK}:{dashboard_port}")
        finally:
            nodes.end(folder)


if __name__ == "__main__":
    cli.run(main)
