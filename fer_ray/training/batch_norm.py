"""Batch normalization over the global batch, on CPUs as on GPUs.

With statistics of each worker's shard alone, the number of workers would change what a run
computes. `torch.nn.SyncBatchNorm` works on GPUs only; `GlobalBatchNorm2d` does the same on CPUs,
with one exchange for each layer in the forward and one in the backward pass.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from fer_ray.errors import UserError
from fer_ray.training import exchange
from fer_ray.training.exchange import Gather


def synchronize(model: nn.Module, device: torch.device) -> nn.Module:
    """Replaces a model's batch-norm layers by ones with statistics of the global batch.

    Parameters, buffers and their names stay, so that state dicts fit both. Every worker of
    `torch.distributed`'s default process group has to call it.

    Raises:
        UserError: on CPUs, where a layer cannot be replaced (`check`).
    """
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    check(model)
    gather = exchange.connect()
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = GlobalBatchNorm2d
            module.gather = gather  # type: ignore[assignment]
    return model


def check(model: nn.Module) -> None:
    """Refuses batch-norm layers that would keep the statistics of each worker's shard on CPUs.

    Raises:
        UserError: for any other batch norm than `BatchNorm2d` itself: another number of
            dimensions, or a subclass, whose `forward` may do something else.
    """
    for name, module in model.named_modules():
        is_batch_norm = isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
        if is_batch_norm and type(module) not in (nn.BatchNorm2d, GlobalBatchNorm2d):
            raise UserError(
                f"--num-workers: layer {name!r} is a {type(module).__name__}, whose statistics "
                "several workers cannot share on CPUs: use --num-workers 1, or nn.BatchNorm2d"
            )


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """`BatchNorm2d` with the statistics of all workers' images together, for CPUs."""

    gather: Gather
    """Exchanges arrays with the other workers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        mean, variance, count = _global_moments(x.detach(), self.gather)
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            unbiased = variance * (count / max(count - 1.0, 1.0))
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(unbiased, self.momentum)
        return _Normalize.apply(
            x, self.weight, self.bias, mean, variance, count, self.eps, self.gather
        )


def _without_overflow_warnings() -> np.errstate:
    """Suppresses overflow warnings; the loop reports them once, with the step."""
    return np.errstate(over="ignore", invalid="ignore")


def _global_moments(x: torch.Tensor, gather: Gather) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Mean and biased variance of each channel over all workers' (N, C, H, W), and the count.

    The workers' moments are merged by the formula of Chan, Golub and LeVeque (1979): sums of
    squares would lose digits of the variance where the mean is large.
    """
    channels = x.shape[1]
    count = x.numel() // channels
    own = np.zeros(2 * channels + 1)
    if count:
        # the kernel inside `BatchNorm2d` (`torch.var_mean` takes twenty times as long here);
        # without float32 buffers to update it would round its results to x's precision
        buffers = torch.zeros(channels), torch.ones(channels)
        mean, variance = torch.ops.aten.batch_norm_update_stats(x, *buffers, 0.0)
        own[:channels], own[channels:-1], own[-1] = mean.numpy(), variance.numpy(), count
    everyone = gather(own)
    counts = everyone[:, -1:]
    total = counts.sum()
    means, variances = everyone[:, :channels], everyone[:, channels:-1]
    with _without_overflow_warnings():
        merged = (means * counts).sum(0) / total
        spread = ((variances + (means - merged) ** 2) * counts).sum(0) / total
        mean, variance = (torch.from_numpy(one.astype(np.float32)) for one in (merged, spread))
    return mean, variance, float(total)


class _Normalize(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) * weight + bias, with the gradient through both moments.

    PyTorch's kernels do the work on the pixels, in as many passes as its own batch norm takes.
    """

    @staticmethod
    def forward(ctx: Any, x, weight, bias, mean, variance, count, eps, gather):
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.count, ctx.eps, ctx.gather = count, eps, gather
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor):
        (grad,) = grads
        x, weight, mean, variance = ctx.saved_tensors
        scale = weight * (variance + ctx.eps).rsqrt()
        # letting the kernel compute w·inv·g costs a pass, which float32 can do without
        fused = x.dtype == torch.float32
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, variance, None, None, False, ctx.eps, [not fused, True, True]
        )
        own = np.concatenate([grad_weight.numpy(), grad_bias.numpy()], dtype=np.float64)
        with _without_overflow_warnings():
            means = torch.from_numpy((ctx.gather(own).sum(0) / -ctx.count).astype(np.float32))
        # dL/dx = w·inv·(g - mean(g) - x̂·mean(g·x̂)); slope·x̂ + offset in one pass
        slope, offset = (scale * one for one in means.chunk(2))
        rest = F.batch_norm(x, mean, variance, slope, offset, False, 0.0, ctx.eps)
        grad_x = rest.addcmul_(grad, scale[:, None, None]) if fused else grad_x.add_(rest)
        return grad_x, grad_weight, grad_bias, None, None, None, None, None
