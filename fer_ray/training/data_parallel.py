"""Averages the gradients of several workers, with the same rounding in every session of a run."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks


def data_parallel(module: nn.Module, example: torch.Tensor, *, compress: bool) -> nn.Module:
    """Wraps a module in PyTorch's `DistributedDataParallel`.

    That puts the gradients into buckets, and orders them anew after the first backward pass. With
    three workers or more, a gradient's place decides in which order its parts are added up, so
    that a resumed run would round its first step differently. The first backward pass is therefore
    one on an example, before training.

    Args:
        module: what trains; all of its parameters take part in every backward pass.
        example: (N, 1, S, S) float32 images on the module's device, N being a group of batch norm.
        compress: whether workers exchange gradients in bfloat16, and not in their own dtype.
    """
    with warnings.catch_warnings():
        # torch 2.15 renames this argument, and earlier releases do not have the new name
        warnings.simplefilter("ignore", FutureWarning)
        # buffers are averaged after each epoch
        parallel = nn.parallel.DistributedDataParallel(
            module, broadcast_buffers=False, gradient_as_bucket_view=True
        )
    if compress:
        parallel.register_comm_hook(None, default_hooks.bf16_compress_hook)
    before = {name: value.clone() for name, value in module.named_buffers()}
    parallel.train()
    parallel(example).sum().backward()
    with torch.no_grad():
        for name, value in module.named_buffers():
            value.copy_(before[name])
    parallel.zero_grad(set_to_none=True)
    return parallel
