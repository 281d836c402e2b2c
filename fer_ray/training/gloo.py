"""The network interface on which gloo listens, chosen in each worker by its node's address."""

from __future__ import annotations

import importlib
import os

import ray.util
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

VARIABLE = "GLOO_SOCKET_IFNAME"


class GlooConfig(TorchConfig):
    """Ray Train's set-up of gloo, after `choose` in every worker."""

    @property
    def backend_cls(self) -> type:
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group, backend_config) -> None:
        worker_group.execute(choose)
        super().on_start(worker_group, backend_config)


def choose() -> None:
    """Has gloo listen where Ray's node is reached, unless `VARIABLE` is set already.

    By itself gloo takes the address of the host's name. On many machines that is 127.0.0.1 or
    127.0.1.1 (in /etc/hosts, where Debian's installer writes it), which workers on other hosts
    cannot reach; and with a node on the loopback it would listen to the world.
    """
    if os.environ.get(VARIABLE):
        return
    psutil = importlib.import_module("psutil")  # Ray brings it
    node = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address == node for one in addresses):
            os.environ[VARIABLE] = name
            return
