"""Gradients across ranks: averaged over replicas, measured over the whole model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

BUCKET_ELEMENTS = 16 * 2**20
"""In one reduction: few calls, and of all gradients only so many are copied at a time."""


def average_gradients(
    parameters: Iterable[Tensor], group: ProcessGroup, replicas: int | None = None
) -> None:
    """Sum every ``.grad`` over ``group``, which holds the same parameters, and divide it by
    ``replicas`` (default: the size of the group), in place, in flat buckets.

    ``replicas`` is that of the model: a rank that computes experts for others has their gradients
    for the others' tokens already.

    A missing gradient becomes zero first (the first sublayer's pseudo-query never gets one), so
    that all replicas reduce the same tensors.
    """
    gradients = [_gradient(parameter) for parameter in parameters]
    replicas = replicas or group.size()
    if replicas == 1:
        return
    for bucket in in_buckets(gradients):
        flat = torch.cat([g.reshape(-1) for g in bucket])
        sum_over(flat, group)
        flat /= replicas
        for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
    return parameter.grad


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


def sum_over(value: Tensor, group: ProcessGroup) -> Tensor:
    """Sum ``value`` over ``group``, in place; returns it."""
    if group.size() > 1:
        dist.all_reduce(value, group=group)
    return value
