""".venv/bin/python cluster/local.py start

Starts a Ray cluster of two nodes, a head and a worker, on this machine. Every port listens on
127.0.0.1 only and requires a token. `status` shows the cluster, `stop` ends this cluster only.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import time
from pathlib import Path

import nodes
from nodes import LOOPBACK, NODES, STATE, TOKEN

from fer_ray import cli
from fer_ray.errors import JobFailed, UserError

_EXAMPLE = """.venv/bin/ray job submit --working-dir . -- python jobs/train.py \\
    --data "$PWD/data/faces" --storage "$PWD/results/runs" --cpus-per-worker 1.5"""


def main() -> None:
    """Starts, shows or stops the cluster."""
    with_command = parser()
    with_command.add_argument("command", choices=("start", "status", "stop"))
    flags = with_command.parse_args()
    folder = Path(flags.dir).expanduser().absolute()
    {"start": start, "status": status, "stop": stop}[flags.command](folder, flags)


def parser() -> cli.JobParser:
    """The flags, without the command."""
    parser = cli.JobParser(prog="local.py", description=__doc__.partition("\n\n")[2])
    add = parser.add_argument
    port = cli.integer(1024, 65535)
    add("--port", type=port, default=6389, help="port of the head's control service (GCS)")
    add("--dashboard-port", type=port, default=8275, help="port of the dashboard and its Jobs API")
    add("--client-port", type=port, default=20011, help="port of Ray Client, which Ray starts too")
    add("--cpus-per-node", type=cli.integer(1), default=2, help="CPUs that each node offers")
    add("--object-store-mb", type=cli.integer(80), default=512, help="shared memory of each node")
    add("--wait-s", type=cli.integer(1), default=180, help="seconds to wait for both nodes")
    add(
        "--dir",
        default=f"/tmp/fer_ray-{os.getuid()}",
        help="folder of the token, the logs and Ray's files; a second cluster needs another one",
    )
    return parser


def start(folder: Path, flags: argparse.Namespace) -> None:
    """Starts both nodes, waits until they are alive, and prints the commands to continue with."""
    if nodes.processes(folder):
        raise UserError(
            f"--dir: a cluster is running in {folder}; stop it first, or give another folder"
        )
    _check_ports(flags)
    nodes.make_private("--dir", folder)
    token = nodes.new_token(folder)
    jobs = f"http://{LOOPBACK}:{flags.dashboard_port}"
    (folder / STATE).write_text(json.dumps({"jobs": jobs}))
    cli.log(f"starting two nodes; logs in {folder}")
    deadline = time.monotonic() + flags.wait_s
    try:
        head = nodes.spawn(folder, "head", _head_command(folder, flags), _environment(folder, jobs))
        nodes.wait(folder, {"head": head}, deadline, lambda: nodes.listens(flags.port))
        joining = {**_environment(folder, jobs), _NOT_LOOPBACK: "1"}
        worker = nodes.spawn(folder, "worker", _worker_command(folder, flags), joining)
        both = {"head": head, "worker": worker}
        nodes.wait(folder, both, deadline, lambda: len(nodes.alive(jobs, token)) == len(NODES))
    except BaseException:
        nodes.end(folder)
        raise
    _show(folder, jobs, token)


def status(folder: Path, flags: argparse.Namespace) -> None:
    """Prints the living nodes and the commands to use them.

    Raises:
        JobFailed: if no cluster is running.
    """
    if not nodes.processes(folder) or not (folder / STATE).exists():
        raise JobFailed(f"no cluster is running in {folder}")
    state = json.loads((folder / STATE).read_text())
    _show(folder, state["jobs"], (folder / TOKEN).read_text())


def stop(folder: Path, flags: argparse.Namespace) -> None:
    """Ends every process of this cluster and removes its token, but keeps the logs."""
    ended = nodes.end(folder)
    cli.log(
        f"ended {ended} processes of {folder}" if ended else f"no cluster is running in {folder}"
    )


def _check_ports(flags: argparse.Namespace) -> None:
    ports = {name: getattr(flags, name) for name in ("port", "dashboard_port", "client_port")}
    for name, port in ports.items():
        flag = f"--{name.replace('_', '-')}"
        if list(ports.values()).count(port) > 1:
            raise UserError(f"{flag}: {port} is given twice; give each flag its own port")
        if nodes.listens(port):
            raise UserError(f"{flag}: {port} is in use; give another port")


def _head_command(folder: Path, flags: argparse.Namespace) -> list[str]:
    return [
        *_common(folder, "head", flags),
        *("--head", f"--port={flags.port}"),
        *(f"--dashboard-host={LOOPBACK}", f"--dashboard-port={flags.dashboard_port}"),
        f"--ray-client-server-port={flags.client_port}",
    ]


def _worker_command(folder: Path, flags: argparse.Namespace) -> list[str]:
    # Ray replaces "127.0.0.1" and "localhost" by an external address, where the head does not
    # listen, but keeps this spelling.
    address = f"--address=LOCALHOST:{flags.port}"
    return [*_common(folder, "worker", flags), address, "--num-gpus=0"]


def _common(folder: Path, name: str, flags: argparse.Namespace) -> list[str]:
    cpus, store = flags.cpus_per_node, flags.object_store_mb
    return [
        *nodes.command(folder, name, cpus=cpus, object_store_mb=store),
        # any free ports: the default ones are the same for all nodes on this machine
        *("--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"),
    ]


_NOT_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""With "0", on Linux too, the head and its jobs use the loopback address. A worker needs "1",
otherwise it refuses to join."""


def _environment(folder: Path, jobs: str) -> dict[str, str]:
    return {**nodes.environment(folder, jobs), _NOT_LOOPBACK: "0"}


def _show(folder: Path, jobs: str, token: str) -> None:
    living = nodes.alive(jobs, token)
    cpus = sum(node["resources_total"].get("CPU", 0) for node in living)
    exports = {**nodes.access(folder), "RAY_API_SERVER_ADDRESS": jobs}
    settings = " ".join(f"{key}={shlex.quote(value)}" for key, value in exports.items())
    cli.log(f"{len(living)} nodes alive, {cpus:g} CPUs; dashboard {jobs}")
    cli.log(f"\nexport {settings}\n{_EXAMPLE}")


if __name__ == "__main__":
    cli.run(main)
