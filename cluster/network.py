"""Hosts on one machine: network namespaces with their own addresses, links and firewall.

    outside 10.78.0.1 ─── gate ─┬─ head   10.77.0.1
                                └─ worker 10.77.0.2

The gate is the switch between the two hosts and the router to a third one outside the cluster. From
there it admits only SSH, as `aws_account.yaml` does. The hosts share the machine's disk, as other
hosts share a network file system. This needs Linux and root.
"""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HOSTS = {"head": "10.77.0.1", "worker": "10.77.0.2"}
OUTSIDE = "10.78.0.1"
OPEN_PORT = 22
_GATE = {"hosts": "10.77.0.254", "outside": "10.78.0.254"}
_REFUSAL = ("pref", "200")
"""Priority of the rule that refuses what the rules before it did not admit."""
_CLONE_NEWNET = 0x40000000
"""From <sched.h>."""


class NotAllowed(Exception):
    """Network namespaces cannot be created here; the message is the reason."""


@dataclass(frozen=True)
class Network:
    """The hosts of one cluster. Networks with different names are separate."""

    name: str

    def namespace(self, host: str) -> str:
        """The name of a host's namespace for `ip netns`."""
        return f"{self.name}-{host}"

    def create(self) -> None:
        """Creates the hosts, after removing those of an earlier run.

        Raises:
            NotAllowed: if this user, machine or container may not.
        """
        self.remove()
        try:
            self._create()
        except (subprocess.CalledProcessError, OSError) as error:
            self.remove()
            reason = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
            raise NotAllowed(str(reason).strip().partition("\n")[0] or "`ip` failed") from error

    def _create(self) -> None:
        for host in ("gate", "outside", *HOSTS):
            _ip("netns", "add", self.namespace(host))
            self._ip(host, "link", "set", "lo", "up")
        self._ip("gate", "link", "add", "hosts", "type", "bridge")
        for host, address in HOSTS.items():
            self._connect(host, address, via=_GATE["hosts"])
            self._ip("gate", "link", "set", host, "master", "hosts", "up")
        self._connect("outside", OUTSIDE, via=_GATE["outside"])
        for link, address in _GATE.items():
            self._ip("gate", "addr", "add", f"{address}/24", "dev", link)
            self._ip("gate", "link", "set", link, "up")
        with self.inside("gate"):
            Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
        ssh = ("iif", "outside", "ipproto", "tcp", "dport", str(OPEN_PORT))
        self._ip("gate", "rule", "add", "pref", "100", *ssh, "lookup", "main")
        self.close_the_gate()

    def _connect(self, host: str, address: str, *, via: str) -> None:
        """Links a host's ``eth0`` to the gate, where the other end has the host's name."""
        peer = ("peer", "name", host, "netns", self.namespace("gate"))
        self._ip(host, "link", "add", "eth0", "type", "veth", *peer)
        self._ip(host, "addr", "add", f"{address}/24", "dev", "eth0")
        self._ip(host, "link", "set", "eth0", "up")
        # Ray finds the host's address by the route to the internet
        self._ip(host, "route", "add", "default", "via", via)

    def remove(self) -> None:
        """Removes the hosts. End their processes first."""
        for host in ("gate", "outside", *HOSTS):
            with contextlib.suppress(subprocess.CalledProcessError, OSError):
                _ip("netns", "del", self.namespace(host))

    def disconnect(self, host: str) -> None:
        """Takes the host's link at the gate down."""
        self._ip("gate", "link", "set", host, "down")

    def reconnect(self, host: str) -> None:
        """Takes the host's link at the gate up again."""
        self._ip("gate", "link", "set", host, "up")

    def open_the_gate(self) -> None:
        """Admits all traffic from outside, as if the firewall was forgotten."""
        self._ip("gate", "rule", "del", *_REFUSAL)

    def close_the_gate(self) -> None:
        """Refuses all traffic from outside except SSH."""
        self._ip("gate", "rule", "add", *_REFUSAL, "iif", "outside", "prohibit")

    @contextlib.contextmanager
    def inside(self, host: str) -> Iterator[None]:
        """Within the block, this thread and all processes and threads it starts are on the host."""
        with Path("/proc/thread-self/ns/net").open() as own:
            with Path("/run/netns", self.namespace(host)).open() as namespace:
                _enter(namespace.fileno())
            try:
                yield
            finally:
                _enter(own.fileno())

    def _ip(self, host: str, *arguments: str) -> None:
        _ip("-n", self.namespace(host), *arguments)


def _ip(*arguments: str) -> None:
    subprocess.run(("ip", *arguments), check=True, capture_output=True, text=True)


def _enter(namespace: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)  # Python has os.setns from 3.12 on
    if library.setns(namespace, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
