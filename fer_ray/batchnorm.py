"""Batch normalization over the global batch, on the CPU as on a GPU.

With statistics of each worker's part alone, the number of workers would change what a run
computes. `torch.nn.SyncBatchNorm` works on GPUs only; `GlobalBatchNorm2d` does the same on the
CPU with one all-reduce a layer forward and one backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F


def synchronize(model: nn.Module, device: torch.device) -> nn.Module:
    """Replaces a model's `BatchNorm2d` layers by ones with statistics of the global batch.

    Parameters, buffers and their names stay, so state dicts fit both.
    """
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = GlobalBatchNorm2d
    return model


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """`BatchNorm2d` whose batch is that of all workers together; CPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        mean, variance, count = _global_moments(x.detach())
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            unbiased = variance * (count / max(count - 1.0, 1.0))
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(unbiased, self.momentum)
        return _Normalize.apply(x, self.weight, self.bias, mean, variance, count, self.eps)


def _global_moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Mean and biased variance of each channel over all workers' (N, C, H, W), and the count.

    The workers' moments are merged by Chan's formula (Chan, Golub, LeVeque 1979): sums of
    squares would lose the variance's digits where the mean is large.
    """
    channels = x.shape[1]
    count = x.numel() // channels
    if count:
        # the kernel inside `BatchNorm2d` (`torch.var_mean` takes twenty times as long here);
        # without float32 buffers to update it would round its results to x's precision
        buffers = torch.zeros(channels), torch.ones(channels)
        mean, variance = torch.ops.aten.batch_norm_update_stats(x, *buffers, 0.0)
        mean, variance = mean.double(), variance.double()
    else:
        mean = variance = torch.zeros(channels, dtype=torch.float64)
    local = torch.cat([mean, variance, torch.tensor([float(count)]).double()])
    gathered = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, local)
    parts = torch.stack(gathered)
    counts = parts[:, -1:]
    total = counts.sum()
    means, variances = parts[:, :channels], parts[:, channels:-1]
    global_mean = (means * counts).sum(0) / total
    global_variance = ((variances + (means - global_mean) ** 2) * counts).sum(0) / total
    return global_mean.float(), global_variance.float(), float(total)


class _Normalize(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) * weight + bias, with the gradient through both moments.

    The fused evaluation kernels do the work over the pixels; what is left of the batch
    statistics' gradient is one multiply and add a channel.
    """

    @staticmethod
    def forward(ctx: Any, x, weight, bias, mean, variance, count, eps):
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.count, ctx.eps = count, eps
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor):
        (grad,) = grads
        x, weight, mean, variance = ctx.saved_tensors
        inverse = (variance + ctx.eps).rsqrt()
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack([grad_weight, grad_bias]).float()
        dist.all_reduce(sums)
        # dL/dx = w·inv·(g - mean(g) - x̂·mean(g·x̂)); the kernel above gave w·inv·g
        slope = -weight * inverse * sums[0] / ctx.count
        offset = -weight * inverse * sums[1] / ctx.count
        # slope·x̂ + offset in one pass over the pixels
        grad_x += F.batch_norm(x, mean, variance, slope, offset, False, 0.0, ctx.eps)
        return grad_x, grad_weight, grad_bias, None, None, None, None
