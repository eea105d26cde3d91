"""Two-phase depth attention as autograd functions that keep no copy of a source.

Shapes: D hidden_size, N sources, S queries, M tokens (all leading dimensions), t tokens of a tile.

Phase 1 reads N sources once for S queries. In its backward pass the sources of a tile stand side by
side per token, v_tND, so that all N x S dot products and weighted sums are a few batched matmuls.
Its scalars have the tokens last: a softmax over a short last dimension takes many times as long.
Phase 2 merges one more source, the partial. Neither keeps a phase-1 output for backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnres_train.model.autograd import Context
from attnres_train.model.depth.lean import (
    contiguous_like,
    inverse_rms,
    logit_gradient,
    no_autocast,
    read_sources,
    rows,
    sums_for,
    tile_size,
    tiles,
)


class DepthPhase1(torch.autograd.Function):
    """S queries' attention over the same N sources.

    ``apply(queries [S, D], eps, *sources [..., D])``, the queries already times their key norm
    weights and in the dtype of the statistics, returns the logits [..., S, N] (no gradient), S
    outputs [..., D] in the sources' dtype and their S log-sum-exps [...]. Saves references to the
    sources, one inverse RMS per (source, token) and one logit per (source, query, token).
    """

    @staticmethod
    def forward(
        ctx: Context, queries_SD: Tensor, eps: float, *sources: Tensor
    ) -> tuple[Tensor, ...]:
        outputs, logits_SNM, inv_rms_NM, lse_SM = read_sources(queries_SD, eps, sources)
        ctx.save_for_backward(queries_SD, logits_SNM, inv_rms_NM, *sources)
        count, tokens = len(outputs), sources[0].shape[:-1]
        logits = logits_SNM.permute(2, 0, 1).view(*tokens, count, len(sources))
        ctx.mark_non_differentiable(logits)
        return logits, *outputs, *lse_SM.view(count, *tokens).unbind()

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, _: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        queries_SD, logits_SNM, inv_rms_NM, *sources = ctx.saved_tensors
        count, dim = queries_SD.shape
        sources_MD, grad_outputs_MD = rows(*sources), rows(*grads[:count])
        # Of results that nobody used (the log-sum-exp of a block's first sublayer, which has no
        # partial to merge) the gradients are zeros, not None.
        grad_lse_SM = torch.stack([grad.flatten() for grad in grads[count:]])
        grad_queries_SD = torch.zeros_like(queries_SD)
        grad_sources = [contiguous_like(source) for source in sources]
        grad_sources_MD = rows(*grad_sources)
        values_tND = queries_SD.new_empty(tile_size(sources_MD), len(sources), dim)
        grads_tSD = queries_SD.new_empty(len(values_tND), count, dim)
        with no_autocast(queries_SD):
            for tile in tiles(sources_MD):
                v_tND = _side_by_side(sources_MD, tile, values_tND)
                grad_tSD = _side_by_side(grad_outputs_MD, tile, grads_tSD)
                logits_SNt, grad_lse_S1t = logits_SNM[..., tile], grad_lse_SM[:, None, tile]
                weights_SNt = logits_SNt.softmax(1)
                dots_SNt = (grad_tSD @ v_tND.mT).permute(1, 2, 0)
                mean_S1t = (weights_SNt * dots_SNt).sum(1, keepdim=True)
                # The log-sum-exp grows with each logit by the logit's weight.
                along_query_SNt, along_source_SNt = logit_gradient(
                    weights_SNt * (dots_SNt - (mean_S1t - grad_lse_S1t)),
                    logits_SNt,
                    inv_rms_NM[:, tile],
                    dim,
                )
                along_query_tNS = _tokens_first(along_query_SNt)
                grad_queries_SD.addmm_(along_query_tNS.flatten(0, 1).T, v_tND.flatten(0, 1))
                # The gradient takes the place of the values, beginning with the term that is a
                # multiple of them, one for all queries.
                v_tND.mul_(along_source_SNt.sum(0).T.unsqueeze(-1))
                v_tND.flatten(0, 1).addmm_(along_query_tNS.flatten(0, 1), queries_SD)
                v_tND.baddbmm_(_tokens_first(weights_SNt), grad_tSD)
                _apart(v_tND, grad_sources_MD, tile)
        return grad_queries_SD, None, *grad_sources


class DepthMerge(torch.autograd.Function):
    """Online-softmax merge of one more source, the partial, into a finished read.

    ``apply(query [D], read [..., D], lse [...], partial [..., D], eps)``, the query already times
    the key norm weight and in the dtype of the statistics, returns the output [..., D] and the
    partial's logit [...] (no gradient). With b = sigmoid(logit - lse), the output is
    h = (1 - b) read + b partial. As dh/dlogit = b (1 - b) (partial - read) = b (partial - h),
    backward needs the output, which the next sublayer keeps anyway, and not the read.
    """

    @staticmethod
    def forward(
        ctx: Context, query_D: Tensor, read: Tensor, lse: Tensor, partial: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        output = contiguous_like(partial)
        output_MD, read_MD, partial_MD = matrices = rows(output, read, partial)
        scalars_3M, lse_M = query_D.new_empty(3, len(output_MD)), lse.reshape(-1)
        with no_autocast(partial):
            for tile in tiles(matrices):
                read_tD, partial_tD = (x[tile].to(query_D.dtype) for x in (read_MD, partial_MD))
                logit_t, inv_rms_t, weight_t = scalars_3M[:, tile].unbind()
                torch.linalg.vector_norm(partial_tD, dim=-1, out=inv_rms_t)
                inverse_rms(inv_rms_t, len(query_D), eps)
                torch.mv(partial_tD, query_D, out=logit_t).mul_(inv_rms_t)
                # Of the difference: the exponentials of logit and log-sum-exp may overflow.
                torch.sub(logit_t, lse_M[tile], out=weight_t).sigmoid_()
                sum_tD = sums_for(output_MD[tile], query_D.dtype)
                torch.lerp(read_tD, partial_tD, weight_t.unsqueeze(-1), out=sum_tD)
                output_MD[tile].copy_(sum_tD)
        ctx.save_for_backward(query_D, partial, output, scalars_3M)
        logit = scalars_3M[0].view(lse.shape)
        ctx.mark_non_differentiable(logit)
        return output, logit

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        query_D, partial, output, scalars_3M = ctx.saved_tensors
        grad_query_D, grad_lse_M = torch.zeros_like(query_D), torch.empty_like(scalars_3M[0])
        grad_read, grad_partial = contiguous_like(partial), contiguous_like(partial)
        inputs = rows(grad, partial, output)
        grad_read_MD, grad_partial_MD = rows(grad_read, grad_partial)
        with no_autocast(partial):
            for tile in tiles(inputs):
                grad_tD, partial_tD, output_tD = (x[tile].to(query_D.dtype) for x in inputs)
                logit_t, inv_rms_t, weight_t = scalars_3M[:, tile].unbind()
                sum_tD = sums_for(grad_partial_MD[tile], query_D.dtype)
                torch.sub(partial_tD, output_tD, out=sum_tD).mul_(grad_tD)
                grad_logit_t = sum_tD.sum(-1).mul_(weight_t)
                # The output depends on logit - lse alone.
                torch.neg(grad_logit_t, out=grad_lse_M[tile])
                along_query_t, along_source_t = logit_gradient(
                    grad_logit_t, logit_t, inv_rms_t, len(query_D)
                )
                torch.mul(grad_tD, weight_t.unsqueeze(-1), out=sum_tD)
                torch.sub(grad_tD, sum_tD, out=grad_read_MD[tile])
                sum_tD.addcmul_(along_query_t.unsqueeze(-1), query_D)
                sum_tD.addcmul_(along_source_t.unsqueeze(-1), partial_tD)
                grad_partial_MD[tile].copy_(sum_tD)
                grad_query_D.addmv_(partial_tD.T, along_query_t)
        return grad_query_D, grad_read, grad_lse_M.view(partial.shape[:-1]), grad_partial, None


def _side_by_side(matrices: Sequence[Tensor], tile: slice, buffer_tND: Tensor) -> Tensor:
    """Copies one tile of N matrices [M, D] into the buffer, [t, N, D], which stays in cache."""
    parts = [x[tile] for x in matrices]
    return torch.stack(parts, 1, out=buffer_tND[: len(parts[0])])


def _apart(values_tND: Tensor, matrices: Sequence[Tensor], tile: slice) -> None:
    """The way back: writes [t, N, D] into the tile of N matrices [M, D]."""
    for matrix, values_tD in zip(matrices, values_tND.unbind(1), strict=True):
        matrix[tile] = values_tD


def _tokens_first(scalars_SNt: Tensor) -> Tensor:
    """Copies [S, N, t] to [t, N, S]; a batched matmul of other strides is a loop over tokens."""
    return scalars_SNt.permute(2, 1, 0).contiguous()
