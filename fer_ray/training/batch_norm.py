"""Batch normalization over the global batch, on the CPU as on a GPU.

With statistics of each worker's part alone, the number of workers would change what a run
computes. `torch.nn.SyncBatchNorm` works on GPUs only; `GlobalBatchNorm2d` does the same on the
CPU with one exchange a layer forward and one backward.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from fer_ray.training import exchange
from fer_ray.training.exchange import Gather


def synchronize(model: nn.Module, device: torch.device) -> nn.Module:
    """Replaces a model's `BatchNorm2d` layers by ones with statistics of the global batch.

    Parameters, buffers and their names stay, so state dicts fit both. Every worker of
    `torch.distributed`'s default group has to call it.
    """
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    gather = exchange.connect()
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = GlobalBatchNorm2d
            module.gather = gather  # type: ignore[assignment]
    return model


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """`BatchNorm2d` whose batch is that of all workers together; CPU."""

    gather: Gather
    """How the workers tell each other what they have."""

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


def _not_finite_is_no_news() -> np.errstate:
    """numpy is not to warn in every worker of what the loop will say once, with its step."""
    return np.errstate(over="ignore", invalid="ignore")


def _global_moments(x: torch.Tensor, gather: Gather) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Mean and biased variance of each channel over all workers' (N, C, H, W), and the count.

    The workers' moments are merged by Chan's formula (Chan, Golub, LeVeque 1979): sums of
    squares would lose the variance's digits where the mean is large.
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
    with _not_finite_is_no_news():
        merged = (means * counts).sum(0) / total
        spread = ((variances + (means - merged) ** 2) * counts).sum(0) / total
        mean, variance = (torch.from_numpy(one.astype(np.float32)) for one in (merged, spread))
    return mean, variance, float(total)


class _Normalize(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) * weight + bias, with the gradient through both moments.

    Kernels of PyTorch do the work over the pixels: as many passes as its own batch norm takes.
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
        # the kernel's w·inv·g, where it is wanted, costs a pass: float32 has a cheaper way
        fused = x.dtype == torch.float32
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, variance, None, None, False, ctx.eps, [not fused, True, True]
        )
        own = np.concatenate([grad_weight.numpy(), grad_bias.numpy()], dtype=np.float64)
        with _not_finite_is_no_news():
            means = torch.from_numpy((ctx.gather(own).sum(0) / -ctx.count).astype(np.float32))
        # dL/dx = w·inv·(g - mean(g) - x̂·mean(g·x̂)); slope·x̂ + offset in one pass
        slope, offset = (scale * one for one in means.chunk(2))
        rest = F.batch_norm(x, mean, variance, slope, offset, False, 0.0, ctx.eps)
        grad_x = rest.addcmul_(grad, scale[:, None, None]) if fused else grad_x.add_(rest)
        return grad_x, grad_weight, grad_bias, None, None, None, None, None
