"""CUDA tensors on a machine without a GPU, and a record of what is done to them.

Fake tensors of PyTorch have a shape, a type and a device, but no values: every operation checks
them as on a GPU, so that a tensor on the wrong device fails. `Recorder` counts what would cost
time there. Two things need a driver even so, and are done in Python here: autograd's engine
(`backward`) and the reducer of `DistributedDataParallel` (`_DataParallel`).
"""

from __future__ import annotations

import collections
import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fer_ray.training import memory_feed
from fer_ray.training.process_group import ProcessGroup

_PACKAGE = Path(memory_feed.__file__).parents[1]
_MODE = FakeTensorMode(allow_non_fake_inputs=True)
"""One for all uses of `fake_cuda`, so that what is built in one can be used in another."""
_WAITS = {"_local_scalar_dense", "bincount", "equal"}
"""Operations whose result depends on values: the host waits for the GPU. With fake values they
return something of the right shape."""
_WAITS_FOR_SHAPE = {"nonzero", "masked_select", "_unique2", "unique_consecutive", "unique_dim"}
"""Operations whose result's shape depends on values, which fake tensors do not have."""
_NO_KERNELS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"} | {
    *("_unsafe_view", "lift_fresh"),
}
"""Operations that start nothing on a GPU, beside views."""
_ONLY_IN_PLACE = {"_fused_sgd_"}
"""Operations that change their arguments alone, and that PyTorch has no fake version of."""


class WaitsForGpu(AssertionError):
    """An operation would wait for the GPU, and what it returns cannot be faked."""


@dataclass(kw_only=True)
class Counts:
    """What happened on the GPU since the last `Recorder.take`."""

    kernels: collections.Counter[str] = field(default_factory=collections.Counter)
    """Operations that compute, by name; an operation of many tensors counts once."""
    waits: list[str] = field(default_factory=list)
    """Host synchronizations: the operation, and the line of the package that runs it."""
    blocking_copies: list[str] = field(default_factory=list)
    """Copies to the GPU that are not from pinned memory, or that the host waits for."""
    copies: int = 0
    """Copies to the GPU that the host does not wait for."""
    collectives: list[tuple[str, str, int]] = field(default_factory=list)
    """Communication in the order in which it starts: the name with the type of the numbers,
    ``forward`` or ``backward``, and the number of them."""


class Recorder(TorchDispatchMode):
    """Records what is done to fake CUDA tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()
        self.phase = "forward"
        self.data_parallel: list[_DataParallel] = []

    def take(self) -> Counts:
        """What was recorded since the last call."""
        taken, self.counts = self.counts, Counts()
        return taken

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        namespace, name = function._schema.name.split("::")
        if namespace in ("prim", "profiler"):
            return function(*args, **kwargs)
        inputs = _tensors((args, kwargs))
        if namespace == "c10d":
            self._record_collective(name, inputs)
            return function(*args, **kwargs)
        on_gpu = any(tensor.is_cuda for tensor in inputs)
        if on_gpu and self._depends_on_values(name, args):
            self.counts.waits.append(_described(name))
        if name in _WAITS and any(isinstance(tensor, FakeTensor) for tensor in inputs):
            return _invented(name, args)
        if name in _ONLY_IN_PLACE:
            assert all(tensor.is_cuda for tensor in inputs), f"{name}: tensors on the CPU"
            result = None
        else:
            result = function(*args, **kwargs)
        if name in ("_to_copy", "copy_"):
            self._record_copy(name, args, kwargs, result)
        on_gpu = on_gpu or any(tensor.is_cuda for tensor in _tensors(result))
        if on_gpu and not function.is_view and name not in _NO_KERNELS:
            self.counts.kernels[name] += 1
        return result

    def _depends_on_values(self, name: str, args: tuple) -> bool:
        by_mask = name in ("index", "index_put_") and any(
            tensor is not None and tensor.dtype in (torch.bool, torch.uint8) for tensor in args[1]
        )
        if name == "index_put_" and by_mask and args[2].numel() == 1:
            by_mask = False  # one number for all: the mask is not turned into positions
        if name in _WAITS_FOR_SHAPE or by_mask:
            raise WaitsForGpu(f"the host waits for the GPU: {_described(name)}")
        return name in _WAITS

    def _record_copy(self, name: str, args: tuple, kwargs: dict, result: torch.Tensor) -> None:
        target, source = (args[0], args[1]) if name == "copy_" else (result, args[0])
        if target.is_cuda == source.is_cuda:
            return
        in_background = kwargs.get("non_blocking", name == "copy_" and len(args) > 2 and args[2])
        on_host = source if target.is_cuda else target
        if in_background and getattr(on_host, "in_pinned_memory", False):
            self.counts.copies += 1
        elif target.is_cuda:
            self.counts.blocking_copies.append(_described(name))
        else:
            self.counts.waits.append(_described("copy to the CPU"))

    def _record_collective(self, name: str, inputs: list[torch.Tensor]) -> None:
        assert all(tensor.is_cuda for tensor in inputs), f"{name}: NCCL has no CPU tensors"
        kind = f"{name} {inputs[0].dtype}".replace("torch.", "") if inputs else name
        numbers = sum(tensor.numel() for tensor in inputs)
        self.counts.collectives.append((kind, self.phase, numbers))

    def backward(self, root: torch.Tensor) -> None:
        """Stands for `Tensor.backward`, with the all-reduce of `DistributedDataParallel`."""
        assert root.is_cuda and root.requires_grad and root.ndim == 0
        self.phase = "backward"
        backward(root)
        for parallel in self.data_parallel:
            parallel.reduce()
        self.phase = "forward"


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _described(name: str) -> str:
    """An operation, and the innermost line of the package that runs it."""
    for frame in reversed(traceback.extract_stack()):
        if Path(frame.filename).is_relative_to(_PACKAGE):
            return f"{name} at {Path(frame.filename).relative_to(_PACKAGE)}:{frame.lineno}"
    return name


def _invented(name: str, args: tuple) -> Any:
    """A result of an operation that reads values: of a whole number -1, which the training loop
    takes for "no step that is not finite"."""
    tensor = args[0]
    if name == "bincount":
        return torch.empty(args[2], dtype=torch.int64, device=tensor.device)
    if name == "equal":
        return True
    if not tensor.is_cuda:
        return 1
    return -1 if tensor.dtype == torch.int64 else 1.0


@torch.no_grad()
def backward(root: torch.Tensor) -> None:
    """Autograd's engine in Python: the real backward functions in an order that fits.

    The engine itself asks the driver for a stream on a device.
    """
    waiting: collections.Counter[Any] = collections.Counter()
    nodes, seen = [root.grad_fn], {root.grad_fn}
    for node in nodes:
        for following, _ in node.next_functions:
            waiting[following] += 1
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
    gradients: dict[Any, dict[int, torch.Tensor]] = {root.grad_fn: {0: torch.ones_like(root)}}
    ready = [root.grad_fn]
    while ready:
        node = ready.pop()
        arrived = gradients.pop(node, {})
        if hasattr(node, "variable"):
            _accumulate(node.variable, arrived[0])
            continue
        inputs = [arrived.get(index) for index in range(len(node._input_metadata))]
        outputs = node(*inputs) if callable(node) else node.apply(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        for (following, index), gradient in zip(node.next_functions, outputs):
            if following is None:
                continue
            if gradient is not None:
                gradient = _fitted(gradient, following._input_metadata[index])
                sums = gradients.setdefault(following, {})
                sums[index] = sums[index] + gradient if index in sums else gradient
            waiting[following] -= 1
            if not waiting[following]:
                ready.append(following)


def _fitted(gradient: torch.Tensor, metadata: Any) -> torch.Tensor:
    """The checks of the engine: sums over what was broadcast; device and type have to be equal."""
    assert gradient.device == metadata.device, "a gradient on the wrong device"
    if gradient.shape != metadata.shape:
        gradient = gradient.sum_to_size(metadata.shape)
    return gradient.to(metadata.dtype)


def _accumulate(parameter: torch.Tensor, gradient: torch.Tensor) -> None:
    if parameter.grad is not None:
        parameter.grad += gradient
    elif gradient.stride() == parameter.stride():
        parameter.grad = gradient
    else:
        parameter.grad = torch.empty_like(parameter).copy_(gradient)


class _DataParallel(nn.Module):
    """Stands for `DistributedDataParallel`: all gradients in one bucket, after backward."""

    def __init__(self, recorder: Recorder, module: nn.Module, **options: Any) -> None:
        super().__init__()
        self.module, self._options = module, options
        recorder.data_parallel.append(self)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        if self._options.get("broadcast_buffers", True):
            for buffer in self.module.buffers():
                dist.broadcast(buffer, 0)
        return self.module(*inputs)

    def register_comm_hook(self, state: Any, hook: Callable) -> None:
        """Hooks change what is sent, which fake tensors do not show."""

    def reduce(self) -> None:
        """Sums the gradients over the workers."""
        bucket = torch.cat([p.grad.flatten() for p in self.module.parameters() if p.requires_grad])
        dist.all_reduce(bucket)


class _InlineExecutor:
    """Stands for a pool of threads: the modes of fake tensors hold for one thread alone."""

    def __init__(self, max_workers: int) -> None:
        pass

    def __enter__(self) -> _InlineExecutor:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def submit(self, function: Callable, *args: Any) -> Future:
        future: Future = Future()
        future.set_result(function(*args))
        return future


@contextlib.contextmanager
def fake_cuda(*, free_bytes: int = 2**30) -> Iterator[Recorder]:
    """Lets code use CUDA devices; yields the record of what it does to them.

    Args:
        free_bytes: free memory of the GPU; decides whether a feed keeps its images there.
    """
    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        _patch_modules(patch)
        _patch_tensors(patch, recorder)
        _patch_cuda(patch, recorder, free_bytes)
        patch.setattr(memory_feed, "ThreadPoolExecutor", _InlineExecutor)
        parallel = lambda module, **options: _DataParallel(recorder, module, **options)  # noqa: E731
        patch.setattr(nn.parallel, "DistributedDataParallel", parallel)
        with _MODE, recorder:
            yield recorder


def _patch_cuda(patch: pytest.MonkeyPatch, recorder: Recorder, free_bytes: int) -> None:
    patch.setattr(torch.cuda, "mem_get_info", lambda device=None: (free_bytes, free_bytes))
    patch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
    patch.setattr(
        torch.cuda, "synchronize", lambda *args: recorder.counts.waits.append("synchronize")
    )
    # otherwise autocast is switched off
    patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    # otherwise one operation for each tensor of a list, as for other subclasses of tensors
    for module in (sys.modules["torch.optim.optimizer"], torch.utils._foreach_utils):
        types = [*module._foreach_supported_types, FakeTensor]
        patch.setattr(module, "_foreach_supported_types", types)


def _patch_modules(patch: pytest.MonkeyPatch) -> None:
    def apply(self: nn.Module, function: Callable, recurse: bool = True) -> nn.Module:
        """Gives a module new parameters: the memory of fake ones cannot be exchanged."""
        for module in self.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    value = function(parameter.detach())
                    module._parameters[name] = nn.Parameter(value, parameter.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = function(buffer)
        return self

    def save(tensors: dict[str, torch.Tensor], metadata: dict | None = None) -> bytes:
        assert not any(tensor.is_cuda for tensor in tensors.values())
        return safetensors.numpy.save({name: t.numpy() for name, t in tensors.items()}, metadata)

    patch.setattr(nn.Module, "_apply", apply)
    patch.setattr(safetensors.torch, "save", save)


def _patch_tensors(patch: pytest.MonkeyPatch, recorder: Recorder) -> None:
    to_numpy = torch.Tensor.numpy

    def pin_memory(self: torch.Tensor, device: Any = None) -> torch.Tensor:
        assert not self.is_cuda, "pin_memory of a tensor on the GPU"
        pinned = self.clone()
        pinned.in_pinned_memory = True
        return pinned

    def numpy(self: torch.Tensor, **kwargs: Any) -> np.ndarray:
        assert not self.is_cuda, "numpy of a tensor on the GPU"
        if not isinstance(self, FakeTensor):
            return to_numpy(self, **kwargs)
        return np.ones(tuple(self.shape), str(self.dtype).removeprefix("torch."))

    def deepcopy(self: FakeTensor, memo: dict[int, Any]) -> torch.Tensor:
        """Without this, `copy` writes into memory that fake tensors do not have."""
        copied = self.detach().clone()
        if isinstance(self, nn.Parameter):
            copied = nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

    patch.setattr(FakeTensor, "__deepcopy__", deepcopy, raising=False)
    patch.setattr(torch.Tensor, "pin_memory", pin_memory)
    patch.setattr(torch.Tensor, "numpy", numpy)
    patch.setattr(torch.Tensor, "backward", lambda self: recorder.backward(self))


@contextlib.contextmanager
def fake_group(*, rank: int, size: int) -> Iterator[ProcessGroup]:
    """One of several workers on GPUs, the others of which compute the same; in `fake_cuda`."""
    all_reduce = ProcessGroup.all_reduce

    def multiply(self: ProcessGroup, values: np.ndarray) -> np.ndarray:
        all_reduce(self, values)
        return np.asarray(values) * self.size

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ProcessGroup, "all_reduce", multiply)
            yield ProcessGroup(rank=rank, size=size, device=torch.device("cuda:0"))
    finally:
        dist.destroy_process_group()
