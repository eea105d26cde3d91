"""Depth attention by our Triton kernels: the same functions as in `lean` and
`two_phase`, with the same results, gradients and memory, for CUDA tensors.

Shapes: D hidden_size, N sources, S queries, M tokens (all leading dimensions).

Importing this module needs Triton. A source or gradient that is not row-major is copied.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnres_train.model.autograd import Context
from attnres_train.model.depth import launch
from attnres_train.model.depth.lean import contiguous_like


class Phase1(torch.autograd.Function):
    """`DepthPhase1` in kernels."""

    @staticmethod
    def forward(
        ctx: Context, queries_SD: Tensor, eps: float, *sources: Tensor
    ) -> tuple[Tensor, ...]:
        count, leading = len(queries_SD), sources[0].shape[:-1]
        outputs = [contiguous_like(sources[0]) for _ in range(count)]
        logits = queries_SD.new_empty(*leading, count, len(sources))
        lse = queries_SD.new_empty(*leading, count)
        inv_rms = queries_SD.new_empty(*leading, len(sources))
        rows = _contiguous(sources)
        launch.phase1_forward(queries_SD, rows, outputs, logits, lse, inv_rms, eps)
        # The sources and not `rows`: a contiguous copy would live until the backward pass.
        ctx.save_for_backward(queries_SD, logits, inv_rms, *sources)
        ctx.mark_non_differentiable(logits)
        return logits, *outputs, *lse.unbind(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, _: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        queries_SD, logits, inv_rms, *sources = ctx.saved_tensors
        rows, grad_outputs = _contiguous(sources), _contiguous(grads[: len(queries_SD)])
        grad_lse = torch.stack(grads[len(queries_SD) :], -1)
        grad_sources = [contiguous_like(source) for source in sources]
        along_query = torch.empty_like(logits)
        launch.phase1_backward(
            queries_SD, rows, grad_outputs, grad_lse, logits, inv_rms, grad_sources, along_query
        )
        return _query_gradient(queries_SD, rows, along_query), None, *grad_sources


class Merge(torch.autograd.Function):
    """`DepthMerge` in kernels."""

    @staticmethod
    def forward(
        ctx: Context, query_D: Tensor, read: Tensor, lse: Tensor, partial: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        output = contiguous_like(partial)
        logit, inv_rms, weight = (query_D.new_empty(lse.shape) for _ in range(3))
        inputs = _contiguous([query_D, read, lse, partial])
        launch.merge_forward(*inputs, output, logit, inv_rms, weight, eps)
        ctx.save_for_backward(query_D, partial, output, logit, inv_rms, weight)
        ctx.mark_non_differentiable(logit)
        return output, logit

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        query_D, partial, output, logit, inv_rms, weight = ctx.saved_tensors
        query_D, rows, grad = _contiguous([query_D, partial, grad])
        grad_read, grad_partial = contiguous_like(partial), contiguous_like(partial)
        grad_lse, along_query = torch.empty_like(logit), torch.empty_like(logit)
        saved = (query_D, rows, output, grad, logit, inv_rms, weight)
        launch.merge_backward(*saved, grad_read, grad_lse, grad_partial, along_query)
        # As of phase 1 with one query and one source: [...] lies in memory as [..., 1, 1] does.
        grad_query_D = _query_gradient(query_D[None], [rows], along_query)[0]
        return grad_query_D, grad_read, grad_lse, grad_partial, None


def depth_read(query_D: Tensor, eps: float, *sources: Tensor) -> tuple[Tensor, Tensor]:
    """`DepthRead.apply`: phase 1 of one query, without its log-sum-exp."""
    logits, output, _ = Phase1.apply(query_D[None], eps, *sources)
    return output, logits.view(-1, len(sources)).T


def _query_gradient(queries_SD: Tensor, rows: list[Tensor], along_query: Tensor) -> Tensor:
    """Sum over tokens and sources of ``along_query`` [..., S, N] times the source, [S, D]. Programs
    write partial sums, so that the order of the summation depends on shapes alone."""
    splits = -(-rows[0][..., 0].numel() // launch.TOKENS_PER_SPLIT)
    sums = queries_SD.new_empty(splits, len(rows), *queries_SD.shape)
    launch.query_gradient(rows, along_query, sums)
    return sums.sum((0, 1))


def _contiguous(tensors: list[Tensor] | tuple[Tensor, ...]) -> list[Tensor]:
    return [x.contiguous() for x in tensors]
