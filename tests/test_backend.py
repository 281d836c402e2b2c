"""What the workers do before they connect: the network interface, and GPUs that do not work."""

from __future__ import annotations

import os

import pytest
import ray.train.torch
import ray.util
import torch
from ray.train.torch import TorchConfig

from fer_ray.runtime import process
from fer_ray.training import backend

VARIABLES = [backend.GLOO_INTERFACE, backend.NCCL_INTERFACE]


@pytest.mark.parametrize(("address", "name"), [("127.0.0.1", "lo"), ("192.0.2.77", "")])
def test_gloo_and_nccl_use_the_interface_by_which_the_node_is_reached(monkeypatch, address, name):
    for variable in VARIABLES:
        monkeypatch.setenv(variable, "")  # so that it is restored
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: address)
    backend.choose_interface()
    # NCCL takes "eth1" for every interface that begins so, and "=eth1" for that one alone
    assert [os.environ[variable] for variable in VARIABLES] == [name, f"={name}" if name else ""]


@pytest.mark.parametrize("variable", VARIABLES)
def test_an_interface_that_the_user_chose_stays(monkeypatch, variable):
    for other in VARIABLES:
        monkeypatch.setenv(other, "")
    monkeypatch.setenv(variable, "eth7")
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    backend.choose_interface()
    assert os.environ[variable] == "eth7"
    assert sorted(os.environ[other].strip("=") for other in VARIABLES) == ["eth7", "lo"]


class Workers:
    """A group of two workers in this process; the second one's GPU may fail."""

    def __init__(self, failure: tuple[str, str] | None) -> None:
        self.failure = failure
        self.calls: list[str] = []

    def execute(self, function, *arguments):
        self.calls.append(function.__name__)
        if function is backend._try_gpu:
            return [None, self.failure]
        return [function(*arguments) for _ in range(2)]


@pytest.mark.parametrize("name", ["gloo", "nccl"])
@pytest.mark.parametrize("failure", [None, ("the GPU of node 10.0.0.2 failed: no driver", "b")])
def test_workers_connect_only_where_every_gpu_works(monkeypatch, name, failure):
    connected: list[str] = []
    base = TorchConfig(name).backend_cls
    monkeypatch.setattr(base, "on_start", lambda self, *given: connected.append(name))
    for variable in (*VARIABLES, backend._GPU_FAILURE):
        monkeypatch.setenv(variable, "")
    workers, config = Workers(failure), backend.Config(name)
    config.backend_cls().on_start(workers, config)
    assert workers.calls[:2] == ["_quieten", "choose_interface"]
    is_refused = name == "nccl" and failure is not None
    assert connected == ([] if is_refused else [name])
    assert backend.failed_gpu() == (failure if is_refused else None)


def test_each_worker_tries_the_gpu_that_ray_train_gave_it(monkeypatch):
    """All workers of a node see all its GPUs; a context on the first would be one too many."""
    tried: list[torch.device] = []
    monkeypatch.setattr(process, "try_gpu", tried.append)
    for device in (torch.device("cuda", 1), torch.device("cpu")):
        monkeypatch.setattr(ray.train.torch, "get_device", lambda device=device: device)
        backend._try_gpu()
    assert tried == [torch.device("cuda", 1), torch.device("cuda", 0)]
