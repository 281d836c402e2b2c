"""Batch norm over two real processes against one that sees the whole batch."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from fer_ray.errors import UserError
from fer_ray.training import batch_norm

COUNTS = (5, 2)  # uneven parts of the batch


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (sum(COUNTS), 4, 6, 6)
    # a mean far from 0: where sums of squares would lose the variance
    x = torch.randn(shape, generator=generator) * 2 + 50
    return x.to(dtype), torch.randn(shape, generator=generator).to(dtype)


def layer() -> torch.nn.BatchNorm2d:
    norm = torch.nn.BatchNorm2d(4)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, 1.0, 1.5, -1.0]))
        norm.bias.copy_(torch.tensor([0.1, 0.0, -0.1, 1.0]))
    return norm


def run(norm: torch.nn.Module, x: torch.Tensor, grad: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    y = norm(x)
    y.backward(grad)
    found = {"y": y, "x": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad}
    found |= {"mean": norm.running_mean, "var": norm.running_var}
    return {name: value.detach().float() for name, value in found.items()}


def worker(rank: int, folder: str, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(COUNTS)
    )
    norm = batch_norm.synchronize(torch.nn.Sequential(layer()), torch.device("cpu"))[0]
    part = slice(sum(COUNTS[:rank]), sum(COUNTS[: rank + 1]))
    x, grad = inputs(dtype)
    torch.save(run(norm, x[part], grad[part]), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03)], ids=["32", "bf16"]
)
def test_two_processes_compute_what_one_does(tmp_path, dtype, tolerance):
    mp.spawn(worker, (str(tmp_path), dtype), nprocs=len(COUNTS))
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(COUNTS))]
    expected = run(layer(), *inputs(dtype))
    for name in ("y", "x"):
        joined = torch.cat([part[name] for part in parts])
        torch.testing.assert_close(joined, expected[name], rtol=tolerance, atol=tolerance)
    for name in ("weight", "bias"):  # each process has its part's: they add up
        total = sum(part[name] for part in parts)
        torch.testing.assert_close(total, expected[name], rtol=tolerance, atol=10 * tolerance)
    for name in ("mean", "var"):
        for part in parts:
            torch.testing.assert_close(part[name], expected[name], rtol=1e-4, atol=1e-4)


def test_synchronizing_keeps_the_state_dict_and_the_evaluation(monkeypatch):
    monkeypatch.setattr(batch_norm.exchange, "connect", lambda: lambda values: values[None])
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), layer()).eval()
    other = batch_norm.synchronize(copy.deepcopy(model), torch.device("cpu"))
    assert list(other.state_dict()) == list(model.state_dict())
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(other(x), model(x))


class OwnBatchNorm(nn.BatchNorm2d):
    pass


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(3), nn.BatchNorm3d(3), OwnBatchNorm(3)])
def test_layers_whose_statistics_cannot_be_shared_are_refused(layer):
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), layer)
    with pytest.raises(UserError, match=f"layer '2' is a {type(layer).__name__}"):
        batch_norm.check(model)
    batch_norm.check(model[:2])
