"""Hosts on one machine: network namespaces with addresses, cables and a firewall of their own.

    outside 10.78.0.1 ─── gate ─┬─ head   10.77.0.1
                                └─ worker 10.77.0.2

The gate is the switch of the two hosts, and the router to a third that is none of them. Of what
comes from there it lets through SSH and nothing else, as `aws_account.yaml` has it. The hosts share
the machine's disk, as others share a network file system. It takes root and Linux.
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
_WALL = ("pref", "200")
"""Where the rule stands that refuses what those before it do not let through."""
_CLONE_NEWNET = 0x40000000
"""From <sched.h>."""


class NotAllowed(Exception):
    """There can be no namespaces here; says why."""


@dataclass(frozen=True)
class Network:
    """The hosts of one cluster; another name is another network, and knows nothing of this one."""

    name: str

    def namespace(self, host: str) -> str:
        """As `ip netns` knows it."""
        return f"{self.name}-{host}"

    def make(self) -> None:
        """Makes the hosts anew.

        Raises:
            NotAllowed: where this user, machine or container cannot.
        """
        self.remove()
        try:
            self._make()
        except (subprocess.CalledProcessError, OSError) as error:
            self.remove()
            said = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
            raise NotAllowed(str(said).strip().partition("\n")[0] or "`ip` failed") from error

    def _make(self) -> None:
        for host in ("gate", "outside", *HOSTS):
            _ip("netns", "add", self.namespace(host))
            self._ip(host, "link", "set", "lo", "up")
        self._ip("gate", "link", "add", "hosts", "type", "bridge")
        for host, address in HOSTS.items():
            self._plug(host, address, via=_GATE["hosts"])
            self._ip("gate", "link", "set", host, "master", "hosts", "up")
        self._plug("outside", OUTSIDE, via=_GATE["outside"])
        for link, address in _GATE.items():
            self._ip("gate", "addr", "add", f"{address}/24", "dev", link)
            self._ip("gate", "link", "set", link, "up")
        with self.inside("gate"):
            Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
        ssh = ("iif", "outside", "ipproto", "tcp", "dport", str(OPEN_PORT))
        self._ip("gate", "rule", "add", "pref", "100", *ssh, "lookup", "main")
        self.close_the_gate()

    def _plug(self, host: str, address: str, *, via: str) -> None:
        """A cable from a host's ``eth0`` to the gate, where its end is named like the host."""
        peer = ("peer", "name", host, "netns", self.namespace("gate"))
        self._ip(host, "link", "add", "eth0", "type", "veth", *peer)
        self._ip(host, "addr", "add", f"{address}/24", "dev", "eth0")
        self._ip(host, "link", "set", "eth0", "up")
        # Ray finds a host's own address by the route to the rest of the world
        self._ip(host, "route", "add", "default", "via", via)

    def remove(self) -> None:
        """Removes whatever there is of it; end its processes first."""
        for host in ("gate", "outside", *HOSTS):
            with contextlib.suppress(subprocess.CalledProcessError, OSError):
                _ip("netns", "del", self.namespace(host))

    def cut(self, host: str) -> None:
        """Pulls the host's cable out of the gate."""
        self._ip("gate", "link", "set", host, "down")

    def mend(self, host: str) -> None:
        """Puts it back."""
        self._ip("gate", "link", "set", host, "up")

    def open_the_gate(self) -> None:
        """Lets everything through from outside, as where somebody forgot the firewall."""
        self._ip("gate", "rule", "del", *_WALL)

    def close_the_gate(self) -> None:
        """Refuses what comes from outside, but for SSH."""
        self._ip("gate", "rule", "add", *_WALL, "iif", "outside", "prohibit")

    @contextlib.contextmanager
    def inside(self, host: str) -> Iterator[None]:
        """This thread, and the processes and threads that it starts, are on the host meanwhile."""
        with Path("/proc/thread-self/ns/net").open() as home:
            with Path("/run/netns", self.namespace(host)).open() as there:
                _enter(there.fileno())
            try:
                yield
            finally:
                _enter(home.fileno())

    def _ip(self, host: str, *arguments: str) -> None:
        _ip("-n", self.namespace(host), *arguments)


def _ip(*arguments: str) -> None:
    subprocess.run(("ip", *arguments), check=True, capture_output=True, text=True)


def _enter(namespace: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)  # os.setns is there from Python 3.12 on
    if library.setns(namespace, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
