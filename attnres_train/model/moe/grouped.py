"""One matmul per expert on rows that are sorted by expert.

Shapes: E experts, I and O sizes of a linear map. There are no atomic adds: results repeat bit for
bit.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from attnres_train.model.autograd import Context


def grouped_linear(rows: Tensor, weight: Tensor, ends: Tensor, fused: bool | None = None) -> Tensor:
    """``rows @ weight[e].T`` for the rows of each expert e: [rows, I], [E, O, I] -> [rows, O].

    ``ends`` int32 [E] is the end of each expert's rows. ``fused`` asks for torch's grouped GEMM (by
    default for bf16 on CUDA with rows of a multiple of 16 bytes), else there is a GEMM per expert.
    """
    if fused is None:
        aligned = weight.shape[1] % 8 == 0 and weight.shape[2] % 8 == 0
        fused = rows.is_cuda and rows.dtype is torch.bfloat16 and aligned and len(rows) > 0
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
