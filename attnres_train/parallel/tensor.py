"""Tensor and sequence parallelism: the ranks of a group share heads, widths and vocabulary, and the
tokens of the residual stream between them.

A sublayer gathers tokens once and scatters its sums once, however many linear maps it has: per
token, (P - 1) / P of a row leaves each rank, both times, and again in the backward pass. The
collectives are torch's on the group itself. megatron-core's mappings would do the same for a stream
of [tokens, samples, width] and allocate on ``torch.cuda.current_device()``, which is an error
without CUDA; its parallel linear layers gather once for each map, six times in KDA.

Shapes: B samples, T tokens, S = T / P those of them here, D width, V vocabulary, P ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable
from torch.distributed import ProcessGroup

from attnres_train.model.split import MakeLinear, TensorSplit, Vocabulary, Whole, plain_linear

# As torch names them from 2.13 on.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def tensor_split(group: ProcessGroup, linear: MakeLinear = plain_linear) -> TensorSplit:
    """The split among the ranks of ``group``, whose linear maps ``linear`` makes."""
    return Whole(linear) if group.size() == 1 else GroupSplit(group, linear)


class GroupSplit:
    """`model.split.TensorSplit` over ``group``: consecutive parts, in the order of its ranks."""

    def __init__(self, group: ProcessGroup, linear: MakeLinear = plain_linear) -> None:
        self.group, self.linear = group, linear
        self._is_shared = True  # the stream

    def share(self, size: int) -> range:
        """Raises ValueError where ``size`` cannot be shared evenly."""
        each, left = divmod(size, self.group.size())
        if left:
            raise ValueError(f"{size} cannot be shared by {self.group.size()} ranks")
        return range(self.group.rank() * each, (self.group.rank() + 1) * each)

    def whole(self, shape: Sequence[int], axis: int | None) -> tuple[int, ...]:
        return tuple(n * (self.group.size() if i == axis else 1) for i, n in enumerate(shape))

    def mine(self, tensor: Tensor, axis: int | None) -> Tensor:
        if axis is None:
            return tensor
        here = self.share(tensor.shape[axis])
        return tensor.narrow(axis, here.start, len(here))

    def column(self, features_in: int, features_out: int) -> nn.Module:
        return self.linear(features_in, len(self.share(features_out)))

    def row(self, features_in: int, features_out: int) -> nn.Module:
        return self.linear(len(self.share(features_in)), features_out)

    def stream(self, tokens: int) -> range:
        return range(tokens) if tokens % self.group.size() else self.share(tokens)

    @contextmanager
    def passing(self, tokens: int) -> Iterator[None]:
        before, self._is_shared = self._is_shared, len(self.stream(tokens)) < tokens
        try:
            yield
        finally:
            self._is_shared = before

    def gather(self, x: Tensor) -> Tensor:
        if not self._is_shared:
            return x
        # As matmuls would take it: narrower where autocast makes it so.
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        return _Gather.apply(x, self.group)

    def scatter(self, x: Tensor) -> Tensor:
        if not self._is_shared:
            total = x.detach().clone()
            dist.all_reduce(total, group=self.group)
            return total
        return _Scatter.apply(x, self.group)

    def vocabulary(self, size: int) -> Vocabulary:
        return SharedVocabulary(self, size)


class SharedVocabulary:
    """`model.split.Vocabulary` of the ranks of ``split``."""

    def __init__(self, split: GroupSplit, size: int) -> None:
        self.split, self.size, self.here = split, size, split.share(size)

    def embedding(self, width: int) -> nn.Module:
        return SharedEmbedding(self.split, self.size, width)

    def highest(self, values: Tensor) -> Tensor:
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.split.group)
        return values

    def total(self, sums: Tensor) -> Tensor:
        dist.all_reduce(sums, group=self.split.group)
        return sums

    def join(self, logits: Tensor) -> Tensor:
        return _Join.apply(logits, self.split.group)


class SharedEmbedding(nn.Module):
    """Rows of an embedding of ``size`` entries: int64 [B, T] -> [B, S, D], the rows of the tokens
    here, wherever they lie."""

    def __init__(self, split: GroupSplit, size: int, width: int) -> None:
        super().__init__()
        self.split, self.here = split, split.share(size)
        self.weight = nn.Parameter(torch.empty(len(self.here), width))

    def forward(self, tokens: Tensor) -> Tensor:
        row = tokens - self.here.start
        elsewhere = (row < 0) | (row >= len(self.here))
        rows = F.embedding(row.masked_fill(elsewhere, 0), self.weight)
        return self.split.scatter(rows.masked_fill(elsewhere.unsqueeze(-1), 0))


def gathered(x: Tensor, group: ProcessGroup, axis: int) -> Tensor:
    """``x`` of all ranks, one after the other along ``axis``."""
    parts = x.new_empty(group.size(), *x.shape)
    _all_gather(parts.flatten(0, 1), x.contiguous(), group=group)
    return parts.movedim(0, axis).flatten(axis, axis + 1)


def _scattered(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum over all ranks of their ``x`` [B, T, D], for the tokens here, [B, S, D]."""
    parts = x.unflatten(1, (group.size(), -1)).movedim(1, 0).contiguous()
    out = x.new_empty(parts.shape[1:])
    _reduce_scatter(out, parts.flatten(0, 1), group=group)
    return out


class _GroupContext(Protocol):
    group: ProcessGroup


class _Gather(Function):
    @staticmethod
    def forward(ctx: _GroupContext, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return gathered(x, group, axis=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: _GroupContext, gradient: Tensor) -> tuple[Tensor, None]:
        return _scattered(gradient, ctx.group), None


class _Scatter(Function):
    @staticmethod
    def forward(ctx: _GroupContext, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _scattered(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: _GroupContext, gradient: Tensor) -> tuple[Tensor, None]:
        return gathered(gradient, ctx.group, axis=1), None


class _Join(Function):
    """Every rank has all logits and does the same with them: it keeps the gradient of its own."""

    @staticmethod
    def forward(ctx: _GroupContext, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return gathered(x, group, axis=x.dim() - 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: _GroupContext, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.chunk(ctx.group.size(), -1)[ctx.group.rank()], None
