"""Batch norm in groups against PyTorch's own on each group, and over several real processes."""

import copy
import socket
from pathlib import Path

import numpy as np
import pytest
import small
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fer_ray.config.schema import TrainConfig, default_group, divisors
from fer_ray.errors import UserError
from fer_ray.models import checkpoint
from fer_ray.training import batch_norm
from fer_ray.training.feed import own_part
from fer_ray.training.loop import Trainer
from fer_ray.training.process_group import ProcessGroup

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SHAPES = {
    nn.BatchNorm1d: [(12, 5), (12, 5, 7)],
    nn.BatchNorm2d: [(12, 5, 6, 6)],
    nn.BatchNorm3d: [(12, 5, 3, 4, 2)],
}


def layer_and_inputs(kind, shape, dtype, channels_last):
    """A layer, an input whose mean is not 0, and the gradient of its output."""
    generator = torch.Generator().manual_seed(0)
    layer = kind(shape[1])
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, 1.0, 1.5, -1.0, 2.0]))
        layer.bias.copy_(torch.tensor([0.1, 0.0, -0.1, 1.0, 0.5]))
    mean = 20 if dtype == torch.float32 else 2  # bfloat16 has three digits for both
    x = (torch.randn(shape, generator=generator) * 2 + mean).to(dtype)
    grad = torch.randn(shape, generator=generator).to(dtype)
    if channels_last and len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    return layer, x, grad


def run(layer, x, grad):
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(grad)
    return {"y": y.detach(), "x": x.grad}


def reference(layer, x, grad, group):
    """PyTorch's layer on each group in float64, and the running statistics that follow from it."""
    layer = copy.deepcopy(layer).double()
    moments, results = [], []
    for part, part_grad in zip(x.double().split(group), grad.double().split(group)):
        alone = copy.deepcopy(layer)
        alone.momentum = 1.0
        results.append(run(alone, part, part_grad))
        for parameter, total in zip(alone.parameters(), layer.parameters()):
            total.grad = parameter.grad + (0 if total.grad is None else total.grad)
        moments.append((alone.running_mean, alone.running_var))
    mean, var = (torch.stack(each).mean(0) for each in zip(*moments))
    values = {name: torch.cat([result[name] for result in results]) for name in ("y", "x")}
    values |= {"weight": layer.weight.grad, "bias": layer.bias.grad}
    return values | {"mean": 0.1 * mean, "var": 0.9 + 0.1 * var}


@pytest.mark.parametrize("device", [CPU, GPU], ids=["in turn", "at once"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["32", "bf16"])
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels last", "contiguous"])
@pytest.mark.parametrize(("kind", "shape"), [(k, s) for k, all_ in SHAPES.items() for s in all_])
@pytest.mark.parametrize("group", [3, 4, 12])
def test_each_group_is_normalized_as_pytorch_does(device, dtype, channels_last, kind, shape, group):
    """What GPUs run is plain tensor operations, so that it can be compared on a CPU."""
    layer, x, grad = layer_and_inputs(kind, shape, dtype, channels_last)
    expected = reference(layer, x, grad, group)
    grouped = batch_norm.in_groups(nn.Sequential(layer), size=group, device=device)
    values = run(grouped, x, grad)
    assert values["y"].dtype == values["x"].dtype == dtype
    assert values["y"].stride() == values["x"].stride() == x.stride()
    values |= {"weight": layer.weight.grad, "bias": layer.bias.grad}
    values |= {"mean": layer.running_mean, "var": layer.running_var}
    tolerance = 2e-4 if dtype == torch.float32 else 0.04
    for name, value in values.items():
        scale = expected[name].abs().max().item()
        difference = (value.double() - expected[name]).abs().max().item()
        assert difference <= tolerance * max(scale, 1.0), name
    assert int(layer.num_batches_tracked) == 1 and layer.momentum == 0.1


@pytest.mark.parametrize("device", [CPU, GPU], ids=["in turn", "at once"])
def test_state_dict_and_evaluation_stay(device):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)).eval()
    other = copy.deepcopy(model)
    grouped = batch_norm.in_groups(other, size=2, device=device)
    assert list(other.state_dict()) == list(model.state_dict())
    x = torch.rand(6, 1, 8, 8)
    assert torch.equal(other(x), model(x)) and torch.equal(grouped(x), model(x))
    plain = nn.Sequential(nn.Linear(2, 3))
    assert batch_norm.in_groups(plain, size=2, device=device) is plain


@pytest.mark.parametrize("device", [CPU, GPU], ids=["in turn", "at once"])
def test_the_layer_that_follows_may_change_the_result_in_place(device):
    gradients = []
    for inplace in (False, True):
        layer, x, grad = layer_and_inputs(nn.BatchNorm2d, (12, 5, 6, 6), torch.float32, True)
        model = nn.Sequential(layer, nn.ReLU(inplace=inplace))
        gradients.append(run(batch_norm.in_groups(model, size=4, device=device), x, grad)["x"])
    assert torch.equal(*gradients)


class Counter(TorchDispatchMode):
    """Counts the operations that compute something."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def test_on_gpus_the_number_of_operations_does_not_grow_with_the_groups():
    counts = set()
    for groups in (2, 32):
        layer, _, _ = layer_and_inputs(nn.BatchNorm2d, (2, 5), torch.float32, False)
        grouped = batch_norm.in_groups(layer, size=4, device=GPU)
        x = torch.rand(4 * groups, 5, 6, 6)
        with Counter() as counter:
            run(grouped, x, torch.ones_like(x))
        counts.add(counter.count)
    (count,) = counts
    assert count < 50


class OwnBatchNorm(nn.BatchNorm2d):
    pass


def test_layers_that_cannot_be_computed_in_groups_are_refused():
    own = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), OwnBatchNorm(3))
    batch_norm.check(own, use_gpu=False)  # group after group, any layer is right
    batch_norm.check(own[:2], use_gpu=True)
    with pytest.raises(UserError, match=r"--use-gpu: layer '2' is a OwnBatchNorm"):
        batch_norm.check(own, use_gpu=True)
    with pytest.raises(UserError, match="the momentum of batch-norm layer '0' is None"):
        batch_norm.check(nn.Sequential(nn.BatchNorm1d(2, momentum=None)), use_gpu=False)


def test_running_statistics_follow_the_average_over_the_groups_of_each_batch():
    generator = torch.Generator().manual_seed(0)
    layer = nn.BatchNorm1d(3, momentum=0.3)
    grouped = batch_norm.in_groups(layer, size=4, device=CPU)
    mean, var = torch.zeros(3), torch.ones(3)
    for groups in (1, 5, 2):
        x = torch.randn(4 * groups, 3, generator=generator) * 3 + 1
        grouped(x)
        parts = x.split(4)
        mean = 0.7 * mean + 0.3 * torch.stack([part.mean(0) for part in parts]).mean(0)
        var = 0.7 * var + 0.3 * torch.stack([part.var(0) for part in parts]).mean(0)
        assert torch.allclose(layer.running_mean, mean) and torch.allclose(layer.running_var, var)
    assert int(layer.num_batches_tracked) == 3


def test_a_batch_that_fails_leaves_the_layers_as_they_were():
    layer = nn.BatchNorm1d(3)
    grouped = batch_norm.in_groups(nn.Sequential(layer, nn.Linear(4, 2)), size=4, device=CPU)
    with pytest.raises(RuntimeError):
        grouped(torch.rand(8, 3))
    assert layer.momentum == 0.1 and torch.equal(layer.running_mean, torch.zeros(3))


def test_the_default_group_divides_the_batch():
    some = {8: 8, 32: 32, 33: 11, 48: 24, 128: 32, 100: 25, 1024: 32, 37: 37, 74: 37, 127: 127}
    assert {batch: default_group(batch) for batch in some} == some
    for batch in range(1, 400):
        assert batch % default_group(batch) == 0
        assert divisors(batch) == [n for n in range(1, batch + 1) if batch % n == 0]


@pytest.mark.parametrize(
    ("schedule", "workers", "model", "message"),
    [
        (
            {"batch_norm_group": 40},
            1,
            "custom_cnn",
            "--batch-norm-group: 40 does not divide --global-batch-size 128; 32 does",
        ),
        (
            {},
            6,
            "efficientnet_b2",
            "--num-workers: 6 workers, but a batch of 128 images has only 4 group(s) of 32 for "
            "batch norm: give --batch-norm-group 16, or --global-batch-size 192 "
            "--batch-norm-group 32",
        ),
        (
            {"batch_norm_group": 16},
            1,
            "sequential_cnn",
            "--batch-norm-group: --model sequential_cnn has no batch norm",
        ),
    ],
)
def test_groups_that_do_not_fit_are_refused(schedule, workers, model, message):
    values = {"schedule": schedule, "scaling": {"num_workers": workers}, "model": {"name": model}}
    with pytest.raises(UserError) as caught:
        TrainConfig.from_dict({"data": "x", **values})
    assert str(caught.value) == message


def test_what_the_refusals_propose_is_accepted():
    for schedule in (
        {"batch_norm_group": 16},
        {"global_batch_size": 192, "batch_norm_group": 32},
    ):
        scaling = {"num_workers": 6}
        TrainConfig.from_dict({"data": "x", "schedule": schedule, "scaling": scaling})
    alone = {"model": {"name": "sequential_cnn"}, "scaling": {"num_workers": 100}}
    assert TrainConfig.from_dict({"data": "x", **alone}).images_per_unit == 1


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 5])
def test_workers_have_whole_groups(workers):
    config = small.config(schedule={"global_batch_size": 20, "batch_norm_group": 4})
    parts = [own_part(config, ProcessGroup(rank=r, size=workers)) for r in range(workers)]
    assert np.concatenate([np.arange(20)[part] for part in parts]).tolist() == list(range(20))
    sizes = [part.stop - part.start for part in parts]
    assert all(size % 4 == 0 for size in sizes) and max(sizes) - min(sizes) <= 4


def train(config: TrainConfig, folder: Path, group: ProcessGroup, *, epochs: int, resume=None):
    info = small.info(120)
    images = (small.split(120), small.split(21, seed=1))
    feed = small.feed(config, *images, described=info, group=group)
    labels = {"run": "x", "environment": {}}
    built = Trainer(config, info, feed, group=group, labels=labels, resume=resume)

    def report(history, snapshot):
        if group.rank == 0 and len(history) == 1:
            folder.mkdir()
            snapshot()(folder)

    built.fit(report, epochs)
    return {"model": built.model.state_dict(), "average": built.average.model.state_dict()}


def worker(rank: int, port: int, size: int, folder: str, values: dict) -> None:
    torch.set_num_threads(1)
    config = TrainConfig.from_dict(values)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size
    )
    group, kept = ProcessGroup(rank=rank, size=size), Path(folder) / f"{size}"
    whole = train(config, kept, group, epochs=2)
    resumed = train(config, kept, group, epochs=2, resume=checkpoint.read(str(kept)))
    torch.save({"whole": whole, "resumed": resumed}, Path(folder) / f"{size}-{rank}.pt")
    dist.destroy_process_group()


def tensors(state: dict) -> dict[str, torch.Tensor]:
    return {f"{part}.{name}": v for part in state for name, v in state[part].items()}


def test_any_number_of_workers_computes_the_same(tmp_path):
    """Five groups of a batch: 1 and 2 and 2, 1 and 1 and 1 and 2; `test_loop` has two workers."""
    config = small.config(
        schedule={"global_batch_size": 20, "batch_norm_group": 4, "epochs": 2},
        optimizer={"learning_rate": 0.01},
    )
    alone = tensors(train(config, tmp_path / "1", ProcessGroup(), epochs=2))
    for size in (3, 4):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        mp.spawn(worker, (port, size, str(tmp_path), config.to_dict()), nprocs=size)
        parts = [torch.load(tmp_path / f"{size}-{rank}.pt") for rank in range(size)]
        first = tensors(parts[0]["whole"])
        for part in parts:
            for name, value in tensors(part["whole"]).items():
                assert torch.equal(value, first[name]), name
            for name, value in tensors(part["resumed"]).items():
                assert torch.equal(value, first[name]), name
        for name, value in alone.items():
            torch.testing.assert_close(first[name], value, rtol=2e-3, atol=5e-4)
