"""The network interface that gloo listens on, chosen in each worker by its node's address."""

from __future__ import annotations

import importlib
import os
from typing import Any

import ray.util
from ray.train.torch import TorchConfig

VARIABLE = "GLOO_SOCKET_IFNAME"
"""Environment variable that gloo reads: the name of the interface."""


class GlooConfig(TorchConfig):
    """Ray Train's configuration of gloo that calls `choose_interface` in every worker first."""

    @property
    def backend_cls(self) -> type[Any]:
        base: type[Any] = super().backend_cls

        class Backend(base):
            def on_start(self, worker_group: Any, backend_config: Any) -> None:
                worker_group.execute(choose_interface)
                super().on_start(worker_group, backend_config)

        return Backend


def choose_interface() -> None:
    """Makes gloo listen on the interface that Ray uses, unless `VARIABLE` is set already.

    By default gloo takes the address that the host's name resolves to. On many machines that is
    127.0.0.1 or 127.0.1.1 (Debian's installer writes it into /etc/hosts), which workers on other
    hosts cannot reach. Conversely, on a node that uses the loopback interface only, gloo would
    listen on a public one.
    """
    if os.environ.get(VARIABLE):
        return
    psutil = importlib.import_module("psutil")  # a dependency of Ray
    node_address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == node_address for address in addresses):
            os.environ[VARIABLE] = name
            return
