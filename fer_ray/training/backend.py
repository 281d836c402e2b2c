"""What happens in every worker before the workers connect: the network interface, the GPU.

Gloo exchanges between CPUs, NCCL between GPUs. `torch.distributed`'s "nccl" is ProcessGroupNCCL2
since PyTorch 2.15; with ``TORCH_DIST_USE_NCCL2=0`` in the workers' environment it is the former
implementation.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
from typing import Any

import ray.train.torch
import ray.util
import torch
from ray.train.torch import TorchConfig

from fer_ray.runtime import process

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
"""Environment variable that gloo reads: the name of the interface."""
NCCL_INTERFACE = "NCCL_SOCKET_IFNAME"
"""Environment variable that NCCL reads: prefixes of interfaces, or ``=`` and a whole name."""

_GPU_FAILURE = "FER_RAY_GPU_FAILURE"
"""Environment variable of a worker: which worker's GPU failed, as JSON."""


class Config(TorchConfig):
    """Ray Train's configuration of a backend, which prepares every worker first.

    Where a GPU does not work, the workers do not connect: their function has to call
    `failed_gpu` and to end. An exception here would print pages, and Ray Train would not retry.
    """

    @property
    def backend_cls(self) -> type[Any]:
        base: type[Any] = super().backend_cls

        class Backend(base):
            def on_start(self, worker_group: Any, backend_config: Any) -> None:
                worker_group.execute(_quieten)
                worker_group.execute(choose_interface)
                if backend_config.backend == "nccl":
                    failures = filter(None, worker_group.execute(_try_gpu))
                    if failure := next(failures, None):
                        worker_group.execute(_remember, failure)
                        return
                super().on_start(worker_group, backend_config)

        return Backend


def _quieten() -> None:
    """Ray Train's lines about its process group are of no use to a person."""
    logging.getLogger("ray.train").setLevel(logging.ERROR)


def _try_gpu() -> tuple[str, str] | None:
    """As `process.try_gpu`, on the GPU that Ray Train gave this worker: it sees its node's others.

    It stays the current one, so that NCCL connects by it.
    """
    device = ray.train.torch.get_device()  # the CPU where PyTorch finds no GPU at all
    return process.try_gpu(device if device.type == "cuda" else torch.device("cuda", 0))


def _remember(failure: tuple[str, str]) -> None:
    os.environ[_GPU_FAILURE] = json.dumps(failure)


def failed_gpu() -> tuple[str, str] | None:
    """In a worker: the reason and the node of a GPU that failed before the workers connected.

    Returns:
        As `process.gpu_failure_here`; None where all GPUs work, or none is used.
    """
    value = os.environ.get(_GPU_FAILURE)
    return tuple(json.loads(value)) if value else None


def choose_interface() -> None:
    """Makes gloo and NCCL use the interface that Ray uses, unless their variables are set already.

    By default gloo takes the address that the host's name resolves to. On many machines that is
    127.0.0.1 or 127.0.1.1 (Debian's installer writes it into /etc/hosts), which workers on other
    hosts cannot reach. Conversely, on a node that uses the loopback interface only, gloo would
    listen on a public one. NCCL takes the first interface that is not docker's or the loopback
    one, which need not lead to the other nodes either.
    """
    psutil = importlib.import_module("psutil")  # a dependency of Ray
    node_address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == node_address for address in addresses):
            # without the sign, NCCL would use eth10 for eth1 too
            for variable, value in ((GLOO_INTERFACE, name), (NCCL_INTERFACE, f"={name}")):
                os.environ[variable] = os.environ.get(variable) or value
            return
