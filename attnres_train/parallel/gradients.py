"""Sums over ranks, and tensors in buckets."""

from __future__ import annotations

from collections.abc import Iterator

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

BUCKET_ELEMENTS = 16 * 2**20
"""In one reduction: few calls, and of all gradients only so many are copied at a time."""


def in_buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of ``tensors`` of one dtype and at most BUCKET_ELEMENTS elements, or one tensor."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        full = size + tensor.numel() > BUCKET_ELEMENTS
        if bucket and (full or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket


def sum_over(value: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Sum ``value`` over ``group`` (None: all processes), in place; returns it."""
    if dist.get_world_size(group) > 1:
        dist.all_reduce(value, group=group)
    return value
