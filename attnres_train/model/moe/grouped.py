"""Moving tokens to their experts and back, and one matmul per expert on the sorted rows.

Shapes: N tokens, K experts per token, E experts, I and O sizes of a linear map; rows = N*K (token,
expert) pairs sorted by expert. There are no atomic adds: results repeat bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from attnres_train.model.autograd import Context


@dataclass(frozen=True)
class Permutation:
    """How the (token, expert) pairs of a micro-batch are sorted by expert.

    ``order`` int64 [rows]: pair (token * K + choice) at each sorted row; ``inverse`` its inverse;
    ``token`` int64 [rows]: the row's token; ``ends`` int32 [E]: end of each expert's rows.
    """

    order: Tensor
    inverse: Tensor
    token: Tensor
    ends: Tensor
    experts_per_token: int

    @classmethod
    def sort(cls, experts: Tensor, num_experts: int) -> Permutation:
        """From the chosen expert of every pair, int64 [N, K]."""
        # Stable: an expert's rows are in the order of the tokens, and so are the sums over them.
        sorted_experts, order = experts.flatten().sort(stable=True)
        # Every index once, so that writing to them has no order to depend on.
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel(), device=order.device)
        wanted = torch.arange(num_experts, device=order.device)
        ends = torch.searchsorted(sorted_experts, wanted, right=True).int()
        return cls(order, inverse, order // experts.shape[1], ends, experts.shape[1])

    @property
    def load(self) -> Tensor:
        """Tokens per expert, int64 [E]."""
        return self.ends.diff(prepend=self.ends.new_zeros(1)).long()


def _spread(x: Tensor, permutation: Permutation) -> Tensor:
    return x.index_select(0, permutation.token)


def _collect(rows: Tensor, permutation: Permutation) -> Tensor:
    by_token = rows.index_select(0, permutation.inverse)
    return by_token.view(-1, permutation.experts_per_token, rows.shape[-1]).sum(1)


class _PermutationContext(Protocol):
    permutation: Permutation


class _Dispatch(Function):
    """Copies tokens to their experts' rows. Its adjoint is a gather and a short sum, which autograd
    would do as a scatter-add."""

    @staticmethod
    def forward(ctx: _PermutationContext, x: Tensor, permutation: Permutation) -> Tensor:
        ctx.permutation = permutation
        return _spread(x, permutation)

    @staticmethod
    def backward(ctx: _PermutationContext, grad: Tensor) -> tuple[Tensor, None]:
        return _collect(grad, ctx.permutation), None


class _Combine(Function):
    """Sums the rows of each token; the adjoint of `_Dispatch`."""

    @staticmethod
    def forward(ctx: _PermutationContext, rows: Tensor, permutation: Permutation) -> Tensor:
        ctx.permutation = permutation
        return _collect(rows, permutation)

    @staticmethod
    def backward(ctx: _PermutationContext, grad: Tensor) -> tuple[Tensor, None]:
        return _spread(grad, ctx.permutation), None


def dispatch(x: Tensor, permutation: Permutation) -> Tensor:
    """[N, D] -> [rows, D], sorted by expert."""
    return _Dispatch.apply(x, permutation)


def combine(rows: Tensor, permutation: Permutation) -> Tensor:
    """[rows, D] -> [N, D], the sum over each token's K rows."""
    return _Combine.apply(rows, permutation)


def grouped_linear(rows: Tensor, weight: Tensor, ends: Tensor, fused: bool | None = None) -> Tensor:
    """``rows @ weight[e].T`` for the rows of each expert e: [rows, I], [E, O, I] -> [rows, O].

    ``ends`` int32 [E] is the end of each expert's rows. ``fused`` asks for torch's grouped GEMM (by
    default for bf16 on CUDA with rows of a multiple of 16 bytes), else there is a GEMM per expert.
    """
    if fused is None:
        aligned = weight.shape[1] % 8 == 0 and weight.shape[2] % 8 == 0
        fused = rows.is_cuda and rows.dtype is torch.bfloat16 and aligned
    return _GroupedLinear.apply(rows, weight, ends, fused)


class _GroupedContext(Context, Protocol):
    fused: bool


class _GroupedLinear(Function):
    """Every GEMM writes into its slice of one output: neither forward nor backward splits,
    concatenates or stacks."""

    @staticmethod
    def forward(
        ctx: _GroupedContext, rows: Tensor, weight: Tensor, ends: Tensor, fused: bool
    ) -> Tensor:
        ctx.save_for_backward(rows, weight, ends)
        ctx.fused = fused
        return _times(rows, weight.transpose(1, 2), ends, fused)

    @staticmethod
    @once_differentiable
    def backward(ctx: _GroupedContext, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, weight, ends = ctx.saved_tensors
        grad = grad.contiguous()  # the gradient of a sum has strides of 0, which grouped_mm refuses
        grad_rows = _times(grad, weight, ends, ctx.fused)
        return grad_rows, _outer(grad, rows, ends, ctx.fused), None, None


def _times(rows: Tensor, matrices: Tensor, ends: Tensor, fused: bool) -> Tensor:
    """[rows, I] times each expert's own of [E, I, O]."""
    if fused:
        return F.grouped_mm(rows, matrices, offs=ends)
    out = rows.new_empty(rows.shape[0], matrices.shape[2])
    for expert, (start, end) in enumerate(pairwise([0, *ends.tolist()])):
        torch.mm(rows[start:end], matrices[expert], out=out[start:end])
    return out


def _outer(left: Tensor, right: Tensor, ends: Tensor, fused: bool) -> Tensor:
    """Sum of outer products over each expert's rows: [rows, O], [rows, I] -> [E, O, I]."""
    if fused:
        # Some GPUs leave the product of an expert without rows unwritten (pytorch issue 172439).
        idle = ends.diff(prepend=ends.new_zeros(1)) == 0
        return F.grouped_mm(left.t(), right, offs=ends).masked_fill_(idle[:, None, None], 0)
    out = left.new_empty(ends.numel(), left.shape[1], right.shape[1])
    for expert, (start, end) in enumerate(pairwise([0, *ends.tolist()])):
        torch.mm(left[start:end].t(), right[start:end], out=out[expert])
    return out
