"""Two-phase depth attention as autograd functions that keep no copy of a source.

Shapes: D hidden_size, N sources, S queries, M tokens (all leading dimensions), t tokens of a tile.

Phase 1 reads N sources once for S queries. Within a tile the sources stand side by side per token,
v_tND, so that all N x S dot products and weighted sums are a few batched matmuls. Phase 2 merges
one more source, the partial. Neither keeps a phase-1 output for backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnres_train.model.depth_attention_lean import (
    contiguous_like,
    inverse_rms,
    logit_gradient,
    rows,
    tiles,
    writing,
)


class DepthPhase1(torch.autograd.Function):
    """S queries' attention over the same N sources.

    ``apply(queries [S, D], eps, *sources [..., D])``, the queries already times their key norm
    weights and in the dtype of the statistics, returns the logits [..., S, N] (no gradient), S
    outputs [..., D] in the sources' dtype and their S log-sum-exps [...]. Saves references to the
    sources, one inverse RMS per (source, token) and one logit per (source, query, token).
    """

    @staticmethod
    def forward(ctx, queries_SD: Tensor, eps: float, *sources: Tensor) -> tuple[Tensor, ...]:
        sources_MD = rows(*sources)
        outputs = [contiguous_like(sources[0]) for _ in queries_SD]
        logits_MSN = queries_SD.new_empty(len(sources_MD[0]), len(queries_SD), len(sources))
        inv_rms_MN = queries_SD.new_empty(len(sources_MD[0]), len(sources))
        with torch.autocast(queries_SD.device.type, enabled=False):
            for tile in tiles(sources_MD):
                v_tND = _side_by_side(sources_MD, tile, queries_SD.dtype)
                inv_rms_tN = inverse_rms(v_tND, eps)
                logits_tSN = (v_tND @ queries_SD.T).mul_(inv_rms_tN.unsqueeze(-1)).mT
                _apart(logits_tSN.softmax(-1) @ v_tND, rows(*outputs), tile)
                logits_MSN[tile], inv_rms_MN[tile] = logits_tSN, inv_rms_tN
        ctx.save_for_backward(queries_SD, logits_MSN, inv_rms_MN, *sources)
        logits = logits_MSN.view(*sources[0].shape[:-1], *logits_MSN.shape[1:])
        ctx.mark_non_differentiable(logits)
        return logits, *outputs, *logits.logsumexp(-1).unbind(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, _, *grads: Tensor) -> tuple[Tensor | None, ...]:
        queries_SD, logits_MSN, inv_rms_MN, *sources = ctx.saved_tensors
        count, dim = queries_SD.shape
        sources_MD, grad_outputs_MD = rows(*sources), rows(*grads[:count])
        grad_lse_MS1 = torch.stack([grad.flatten() for grad in grads[count:]], -1).unsqueeze(-1)
        grad_queries_SD = torch.zeros_like(queries_SD)
        grad_sources = [contiguous_like(source) for source in sources]
        with torch.autocast(queries_SD.device.type, enabled=False):
            for tile in tiles(sources_MD):
                v_tND = _side_by_side(sources_MD, tile, queries_SD.dtype)
                grad_tSD = _side_by_side(grad_outputs_MD, tile, queries_SD.dtype)
                logits_tSN = logits_MSN[tile]
                weights_tSN = logits_tSN.softmax(-1)
                dots_tSN = grad_tSD @ v_tND.mT
                mean_tS1 = (weights_tSN * dots_tSN).sum(-1, keepdim=True)
                grad_logits_tSN = weights_tSN * (dots_tSN - mean_tS1 + grad_lse_MS1[tile])
                along_query_tSN, along_source_tSN = logit_gradient(
                    grad_logits_tSN, logits_tSN, inv_rms_MN[tile].unsqueeze(1), dim
                )
                grad_tND = weights_tSN.mT @ grad_tSD
                along_query_RS = along_query_tSN.mT.reshape(-1, count)  # R = t x N
                grad_tND.view(-1, dim).addmm_(along_query_RS, queries_SD)
                grad_tND.addcmul_(v_tND, along_source_tSN.sum(1).unsqueeze(-1))
                grad_queries_SD.addmm_(along_query_RS.T, v_tND.view(-1, dim))
                _apart(grad_tND, rows(*grad_sources), tile)
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
        ctx, query_D: Tensor, read: Tensor, lse: Tensor, partial: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        output = contiguous_like(partial)
        logit, inv_rms, weight = (query_D.new_empty(lse.shape) for _ in range(3))
        output_MD, read_MD, partial_MD = matrices = rows(output, read, partial)
        lse_M, logit_M, inv_rms_M, weight_M = (x.reshape(-1) for x in (lse, logit, inv_rms, weight))
        with torch.autocast(partial.device.type, enabled=False):
            for tile in tiles(matrices):
                read_tD, partial_tD = (x[tile].to(query_D.dtype) for x in (read_MD, partial_MD))
                inv_rms_t = inverse_rms(partial_tD, eps)
                logit_t = (partial_tD @ query_D).mul_(inv_rms_t)
                weight_t = torch.sigmoid(logit_t - lse_M[tile])
                with writing(output_MD[tile], query_D.dtype) as output_tD:
                    torch.lerp(read_tD, partial_tD, weight_t.unsqueeze(-1), out=output_tD)
                logit_M[tile], inv_rms_M[tile], weight_M[tile] = logit_t, inv_rms_t, weight_t
        ctx.save_for_backward(query_D, partial, output, logit, inv_rms, weight)
        ctx.mark_non_differentiable(logit)
        return output, logit

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _) -> tuple[Tensor | None, ...]:
        query_D, partial, output, logit, inv_rms, weight = ctx.saved_tensors
        grad_query_D = torch.zeros_like(query_D)
        grad_lse = torch.empty_like(logit)
        grad_read, grad_partial = contiguous_like(partial), contiguous_like(partial)
        inputs = rows(grad, partial, output)
        grad_read_MD, grad_partial_MD = rows(grad_read, grad_partial)
        weight_M, grad_lse_M = weight.view(-1), grad_lse.view(-1)
        with torch.autocast(partial.device.type, enabled=False):
            for tile in tiles(inputs):
                grad_tD, partial_tD, output_tD = (x[tile].to(query_D.dtype) for x in inputs)
                weight_t = weight_M[tile]
                grad_logit_t = weight_t * (grad_tD * (partial_tD - output_tD)).sum(-1)
                along_query_t, along_source_t = logit_gradient(
                    grad_logit_t, logit.view(-1)[tile], inv_rms.view(-1)[tile], len(query_D)
                )
                with writing(grad_read_MD[tile], query_D.dtype) as grad_read_tD:
                    torch.mul(grad_tD, (1 - weight_t).unsqueeze(-1), out=grad_read_tD)
                with writing(grad_partial_MD[tile], query_D.dtype) as grad_partial_tD:
                    torch.outer(along_query_t, query_D, out=grad_partial_tD)
                    grad_partial_tD.addcmul_(partial_tD, along_source_t.unsqueeze(-1))
                    grad_partial_tD.addcmul_(grad_tD, weight_t.unsqueeze(-1))
                grad_query_D.addmv_(partial_tD.T, along_query_t)
                grad_lse_M[tile] = -grad_logit_t
        return grad_query_D, grad_read, grad_lse, grad_partial, None


def _side_by_side(matrices: Sequence[Tensor], tile: slice, dtype: torch.dtype) -> Tensor:
    """Copies one tile of N matrices [M, D] into a tensor [t, N, D] of ``dtype``."""
    parts = [x[tile] for x in matrices]
    tokens, dim = parts[0].shape
    return torch.stack(parts, 1, out=parts[0].new_empty(tokens, len(parts), dim, dtype=dtype))


def _apart(values_tND: Tensor, matrices: Sequence[Tensor], tile: slice) -> None:
    """The way back: writes [t, N, D] into the tile of N matrices [M, D]."""
    for matrix, values_tD in zip(matrices, values_tND.unbind(1), strict=True):
        matrix[tile] = values_tD
