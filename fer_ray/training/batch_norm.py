"""Ghost batch normalization: the statistics of groups of a batch, whatever the number of workers.

With statistics of each worker's part of the batch, the number of workers would change what a run
computes; with those of the global batch, workers would wait for each other in every layer. Groups
of consecutive images of the global batch (Hoffer et al. 2017, arXiv:1705.08741) do neither: each
worker computes whole groups. Groups of 16 to 64 images also generalize better than larger ones on
small data sets (Summers and Dinneen 2020, arXiv:1906.03548).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fer_ray.errors import UserError
from fer_ray.training.process_group import ProcessGroup

_LAYERS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def in_groups(network: nn.Module, *, size: int, device: torch.device) -> nn.Module:
    """A module that runs a network with batch norm over groups of `size` images.

    Parameters, buffers and their names in `network` stay. The running statistics become averages
    over the groups of each batch.

    Args:
        network: what trains; on GPUs the classes of its batch-norm layers are replaced.
        size: images in a group; batches have to be multiples of it.
        device: where it computes.

    Returns:
        A module for training batches; the network itself where it has no batch norm, or computes
        all groups at once.
    """
    if not _layers(network):
        return network
    if device.type == "cpu":
        return GroupsInTurn(network, size)
    for _, layer in _layers(network):
        layer.__class__ = _GROUPED[type(layer)]
        layer.group = size
    return network


def check(network: nn.Module, *, use_gpu: bool) -> None:
    """Refuses batch-norm layers that cannot be computed in groups.

    Raises:
        UserError: for layers whose running statistics are plain means of all batches, and on GPUs
            for subclasses of PyTorch's layers, whose `forward` may do something else.
    """
    for name, layer in _layers(network):
        if layer.momentum is None:
            raise UserError(
                f"--model: the momentum of batch-norm layer {name!r} is None, so that its running "
                "statistics would depend on the number of workers: give it a number, such as 0.1"
            )
        if use_gpu and type(layer) not in _GROUPED:
            raise UserError(
                f"--use-gpu: layer {name!r} is a {type(layer).__name__}; batch norm in groups "
                f"knows {', '.join(f'nn.{known.__name__}' for known in _LAYERS)}"
            )


def average_statistics(
    networks: Iterable[nn.Module], *, fraction: float, group: ProcessGroup
) -> None:
    """Gives all workers the same running statistics: the average over all groups of all workers.

    A worker's running statistics are linear in its groups' moments, and so is the average of the
    weights. From a common start, the workers' averages, weighted by their numbers of images,
    therefore equal what one worker computes, up to rounding.

    Args:
        networks: all floating-point buffers of these are averaged.
        fraction: of the global batch's images that this worker computes, in (0, 1].
        group: the workers; all of them have to call this.
    """
    buffers = [b for net in networks for b in net.buffers() if b.is_floating_point()]
    if group.size == 1 or not buffers:
        return
    own = torch.cat([buffer.detach().flatten().double() for buffer in buffers])
    total = torch.from_numpy(group.all_reduce(own.cpu().numpy() * fraction)).to(own.device)
    with torch.no_grad():
        for buffer, values in zip(buffers, total.split([buffer.numel() for buffer in buffers])):
            buffer.copy_(values.view_as(buffer))


def _layers(network: nn.Module) -> list[tuple[str, Any]]:
    return [(name, layer) for name, layer in network.named_modules() if isinstance(layer, _LAYERS)]


class GroupsInTurn(nn.Module):
    """Runs a network on one group after the other, with its own batch-norm layers: for CPUs.

    A group's activations fit into a CPU's caches where a batch's do not: custom_cnn trains faster
    than on whole batches.
    """

    def __init__(self, network: nn.Module, size: int) -> None:
        """Takes the network and the number of images in a group."""
        super().__init__()
        self.network, self._size = network, size
        self._tracking = [_Tracking(layer) for _, layer in _layers(network) if _tracks(layer)]

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """What the network returns for each group of (N, ...), joined again."""
        groups = batch.split(self._size)
        if not self.network.training or len(groups) == 1:
            return torch.cat([self.network(group) for group in groups])
        results = []
        try:
            for tracking in self._tracking:
                tracking.begin()
            for group in groups:
                results.append(self.network(group))
                for tracking in self._tracking:
                    tracking.add()
            for tracking in self._tracking:
                tracking.finish(len(groups))
        finally:
            for tracking in self._tracking:
                tracking.end()
        return torch.cat(results)


def _tracks(layer: Any) -> bool:
    return layer.running_mean is not None


class _Tracking:
    """Has a layer follow the average over the groups of a batch, as if that were one group.

    During the batch the layer has another buffer and a momentum of 1, so that the buffer holds the
    moments of the last group. The same momentum for all groups lets a network be compiled once.
    """

    def __init__(self, layer: Any) -> None:
        self._layer, self._buffers = layer, (layer.running_mean, layer.running_var)
        self._momentum = layer.momentum
        # only the layer itself writes to these: backward passes refuse tensors that others changed
        self._moments = tuple(torch.zeros_like(buffer) for buffer in self._buffers)
        self._sums = tuple(torch.zeros_like(buffer) for buffer in self._buffers)

    def begin(self) -> None:
        self._layer.momentum = 1.0
        self._layer.running_mean, self._layer.running_var = self._moments
        for total in self._sums:
            total.zero_()

    def add(self) -> None:
        for total, moments in zip(self._sums, self._moments):
            total.add_(moments)

    def finish(self, count: int) -> None:
        with torch.no_grad():
            for buffer, total in zip(self._buffers, self._sums):
                buffer.lerp_(total.div_(count), self._momentum)
        self._layer.num_batches_tracked.sub_(count - 1)  # counts steps, not groups

    def end(self) -> None:
        self._layer.momentum = self._momentum
        self._layer.running_mean, self._layer.running_var = self._buffers


class _GroupedBatchNorm:
    """Batch norm over all groups of a batch at once: the number of kernels does not grow."""

    group: int
    """Images in a group."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """(N, C, ...) to the same shape, each group of images normalized on its own."""
        if not self.training:
            return super().forward(x)  # type: ignore[misc]
        y, mean, variance = _NormalizeGroups.apply(x, self.weight, self.bias, self.eps, self.group)
        if self.running_mean is not None:
            count = self.group * x[0, 0].numel()
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                self.running_mean.lerp_(mean.mean(0), self.momentum)
                unbiased = variance.mean(0) * (count / max(count - 1, 1))
                self.running_var.lerp_(unbiased, self.momentum)
        return y


class _GroupedBatchNorm1d(_GroupedBatchNorm, nn.BatchNorm1d):
    pass


class _GroupedBatchNorm2d(_GroupedBatchNorm, nn.BatchNorm2d):
    pass


class _GroupedBatchNorm3d(_GroupedBatchNorm, nn.BatchNorm3d):
    pass


_GROUPED: dict[type, type] = {
    nn.BatchNorm1d: _GroupedBatchNorm1d,
    nn.BatchNorm2d: _GroupedBatchNorm2d,
    nn.BatchNorm3d: _GroupedBatchNorm3d,
}


class _NormalizeGroups(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) * weight + bias of each group and channel.

    Inputs of any memory format are read in place: a group is a slice of the outermost dimension.
    Sums are kept in float32 where `x` has fewer digits, which the kernels do while they read.
    Returns y, and the mean and biased variance of each group and channel, (groups, C) float32.
    """

    @staticmethod
    def forward(ctx: Any, x, weight, bias, eps, group):
        groups = x.unflatten(0, (-1, group))
        mean, variance = _moments(groups)
        inverse = (variance + eps).rsqrt()
        scale = inverse if weight is None else inverse * _like_channels(weight, groups)
        shift = -mean * scale if bias is None else _like_channels(bias, groups) - mean * scale
        # not a view, which the operation that follows could not change in place
        y = torch.empty_like(x)
        torch.addcmul(shift, groups, scale, out=y.unflatten(0, (-1, group)))
        ctx.save_for_backward(x, weight, mean, inverse, scale)
        ctx.group, ctx.has_bias = group, bias is not None
        mean, variance = mean.flatten(1), variance.flatten(1)
        ctx.mark_non_differentiable(mean, variance)
        return y, mean, variance

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor):
        x, weight, mean, inverse, scale = ctx.saved_tensors
        groups, grad = (t.unflatten(0, (-1, ctx.group)) for t in (x, grads[0]))
        dims = _but_channels(groups)
        count = groups[0].numel() // groups.shape[2]
        product = torch.empty_like(groups, dtype=mean.dtype)
        torch.mul(grad, groups, out=product)
        sum_grad = grad.sum(dims, keepdim=True, dtype=mean.dtype)
        # of the gradient times the normalized input
        sum_product = (product.sum(dims, keepdim=True) - mean * sum_grad) * inverse
        # dL/dx = scale (g - mean(g) - x̂ mean(g x̂)), as slope x + offset + scale g
        slope = scale * inverse * sum_product / -count
        offset = scale * sum_grad / -count - mean * slope
        torch.addcmul(offset, groups, slope, out=product)
        grad_x = torch.addcmul(product, grad, scale, out=torch.empty_like(groups)).flatten(0, 1)
        grad_weight = None if weight is None else sum_product.sum(0).flatten()
        grad_bias = sum_grad.sum(0).flatten() if ctx.has_bias else None
        return grad_x, grad_weight, grad_bias, None, None


def _moments(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance of (groups, images, C, ...) over all but groups and channels."""
    dims = _but_channels(groups)
    if groups.dtype in (torch.float32, torch.float64):
        variance, mean = torch.var_mean(groups, dims, correction=0, keepdim=True)
        return mean, variance
    # `var_mean` would round its results to the input's digits. A sum of squares loses digits of
    # the variance where the mean is large, but fewer than such an input has lost itself
    mean = groups.mean(dims, keepdim=True, dtype=torch.float32)
    count = groups[0].numel() // groups.shape[2]
    norm = torch.linalg.vector_norm(groups, 2, dims, keepdim=True, dtype=torch.float32)
    return mean, (norm.square() / count - mean.square()).clamp_min(0)


def _but_channels(groups: torch.Tensor) -> list[int]:
    return [dim for dim in range(groups.ndim) if dim not in (0, 2)]


def _like_channels(values: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """(C,) in a shape that is broadcast along the channels."""
    return values.view(1, 1, -1, *([1] * (groups.ndim - 3)))
