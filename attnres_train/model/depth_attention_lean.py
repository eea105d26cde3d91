"""Autograd functions of depth attention that keep no copy of a source.

Shapes: D hidden_size, N sources, S queries, M tokens (all leading dimensions), t tokens of a tile.

Tokens are processed in tiles small enough that every temporary stays in cache: each source is read
once from memory per pass and each gradient written once. Within a tile the sources stand side by
side per token, v_tND, so that all N x S dot products and weighted sums are a few batched matmuls.

Saved for backward: references to the sources (and, in the merge, its output), one inverse RMS per
(source, token), one logit per (source, query, token). The gradient of a logit
l = r (u . v), r = (mean(v^2) + eps)^(-1/2), with respect to its source is r u - (l r^2 / D) v.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_TILE_BYTES_CPU = 1 << 20  # about one core's L2 cache
_TILE_BYTES_DEVICE = 1 << 26  # large enough that kernel launches do not dominate


class DepthRead(torch.autograd.Function):
    """S reads of the same N sources.

    ``apply(queries [S, D], eps, *sources [..., D])``, with the key norm weight folded into the
    queries, returns ``logits [..., S, N]`` (no gradient), S outputs [..., D] in the sources' dtype
    and their S log-sum-exps [...]. Gradients flow through outputs and log-sum-exps.
    """

    @staticmethod
    def forward(ctx, queries_SD: Tensor, eps: float, *sources: Tensor) -> tuple[Tensor, ...]:
        like = sources[0]
        rows = _rows(sources)
        outputs = [like.new_empty(like.shape) for _ in queries_SD]
        logits_MSN = queries_SD.new_empty(len(rows[0]), len(queries_SD), len(sources))
        inv_rms_MN = queries_SD.new_empty(len(rows[0]), len(sources))
        with torch.autocast(like.device.type, enabled=False):
            for tile in _tiles(rows):
                v_tND = _side_by_side(rows, tile, queries_SD.dtype)
                inv_rms_MN[tile] = inv_rms_tN = _inverse_rms(v_tND, eps)
                logits_tSN = (v_tND @ queries_SD.T).mul_(inv_rms_tN.unsqueeze(-1)).mT
                logits_MSN[tile] = logits_tSN
                _write(_rows(outputs), tile, logits_tSN.softmax(-1) @ v_tND)
        ctx.save_for_backward(queries_SD, logits_MSN, inv_rms_MN, *sources)
        ctx.set_materialize_grads(False)
        logits = logits_MSN.view(*like.shape[:-1], *logits_MSN.shape[1:])
        ctx.mark_non_differentiable(logits)
        return logits, *outputs, *logits.logsumexp(-1).unbind(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, _, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        queries_SD, logits_MSN, inv_rms_MN, *sources = ctx.saved_tensors
        count, dim = queries_SD.shape
        rows = _rows(sources)
        grad_outputs = [_or_zeros(grad, sources[0]).reshape(-1, dim) for grad in grads[:count]]
        grad_lse_MS = torch.stack(
            [_or_zeros(grad, inv_rms_MN[:, 0]).reshape(-1) for grad in grads[count:]], -1
        )
        grad_queries_SD = torch.zeros_like(queries_SD)
        grad_sources = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in sources]
        with torch.autocast(queries_SD.device.type, enabled=False):
            for tile in _tiles(rows):
                v_tND = _side_by_side(rows, tile, queries_SD.dtype)
                grad_tSD = _side_by_side(grad_outputs, tile, queries_SD.dtype)
                logits_tSN, inv_rms_tN = logits_MSN[tile], inv_rms_MN[tile]
                weights_tSN = logits_tSN.softmax(-1)

                dot_tSN = grad_tSD @ v_tND.mT
                mean_tS1 = (weights_tSN * dot_tSN).sum(-1, keepdim=True)
                grad_logits_tSN = weights_tSN * (dot_tSN - mean_tS1 + grad_lse_MS[tile, :, None])
                along_query_tNS = (grad_logits_tSN * inv_rms_tN.unsqueeze(1)).mT
                along_source_tN = (grad_logits_tSN * logits_tSN).sum(1) * inv_rms_tN**2 / dim

                grad_tND = weights_tSN.mT @ grad_tSD
                grad_tND += along_query_tNS @ queries_SD
                grad_tND.addcmul_(v_tND, along_source_tN.unsqueeze(-1), value=-1)
                _write(_rows(grad_sources), tile, grad_tND)
                grad_queries_SD.addmm_(along_query_tNS.flatten(0, 1).T, v_tND.flatten(0, 1))
        return grad_queries_SD, None, *grad_sources


class DepthMerge(torch.autograd.Function):
    """Online-softmax merge of one more source, the partial, into a finished read.

    ``apply(query [D], read [..., D], lse [...], partial [..., D], eps)``, with the key norm weight
    folded into the query, returns the merged output [..., D] and the partial's logit [...] (no
    gradient). With b = sigmoid(logit - lse) the output is h = (1 - b) read + b partial, and
    db/dlogit (partial - read) = b (partial - h): backward needs the output, which the next sublayer
    keeps anyway, and not the read.
    """

    @staticmethod
    def forward(
        ctx, query_D: Tensor, read: Tensor, lse: Tensor, partial: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        output = torch.empty_like(partial, memory_format=torch.contiguous_format)
        inv_rms, logit = torch.empty_like(lse), torch.empty_like(lse)
        rows = _rows([partial, read, output])
        inv_rms_M, logit_M, lse_M = inv_rms.view(-1), logit.view(-1), lse.reshape(-1)
        with torch.autocast(partial.device.type, enabled=False):
            for tile in _tiles(rows):
                partial_tD, read_tD = (x[tile].to(query_D.dtype) for x in rows[:2])
                inv_rms_M[tile] = inv_rms_t = _inverse_rms(partial_tD, eps)
                logit_M[tile] = logit_t = partial_tD @ query_D * inv_rms_t
                weight_t = torch.sigmoid(logit_t - lse_M[tile])
                rows[2][tile] = torch.lerp(read_tD, partial_tD, weight_t.unsqueeze(-1))
        weight = torch.sigmoid(logit - lse)
        ctx.save_for_backward(query_D, partial, output, inv_rms, logit, weight)
        ctx.mark_non_differentiable(logit)
        ctx.set_materialize_grads(False)
        return output, logit

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor | None, _) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return None, None, None, None, None
        query_D, partial, output, inv_rms, logit, weight = ctx.saved_tensors
        dtype, dim = query_D.dtype, len(query_D)
        grad_read, grad_partial = output.new_empty(output.shape), output.new_empty(output.shape)
        grad_logit = torch.empty_like(logit)
        grad_query_D = torch.zeros_like(query_D)
        rows = _rows([partial, output, grad_output])
        logit_M, inv_rms_M, weight_M = logit.view(-1), inv_rms.view(-1), weight.view(-1)
        with torch.autocast(partial.device.type, enabled=False):
            for tile in _tiles(rows):
                partial_tD, output_tD, grad_tD = (x[tile].to(dtype) for x in rows)
                weight_t, inv_rms_t = weight_M[tile], inv_rms_M[tile]
                grad_logit_t = weight_t * _dot(grad_tD, partial_tD - output_tD)
                along_query_t = grad_logit_t * inv_rms_t
                along_source_t = along_query_t * logit_M[tile] * inv_rms_t / dim

                gradient_tD = weight_t.unsqueeze(-1) * grad_tD
                _rows([grad_read])[0][tile] = grad_tD - gradient_tD
                gradient_tD.addr_(along_query_t, query_D)
                gradient_tD.addcmul_(partial_tD, along_source_t.unsqueeze(-1), value=-1)
                _rows([grad_partial])[0][tile] = gradient_tD
                grad_logit.view(-1)[tile] = grad_logit_t
                grad_query_D += along_query_t @ partial_tD
        return grad_query_D, grad_read, -grad_logit, grad_partial, None


def _rows(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors as matrices of one token per row."""
    return [x.reshape(-1, x.shape[-1]) for x in tensors]


def _tiles(rows: Sequence[Tensor]) -> Iterator[slice]:
    """Slices of tokens over which all ``rows`` together, in fp32, fill one tile's bytes."""
    tokens, dim = rows[0].shape
    budget = _TILE_BYTES_CPU if rows[0].device.type == "cpu" else _TILE_BYTES_DEVICE
    size = max(1, budget // (4 * dim * len(rows)))
    return (slice(start, start + size) for start in range(0, tokens, size))


def _side_by_side(rows: Sequence[Tensor], tile: slice, dtype: torch.dtype) -> Tensor:
    """Copies one tile of N matrices [M, D] into [t, N, D] of ``dtype``."""
    tiles = [x[tile] for x in rows]
    out = tiles[0].new_empty(len(tiles[0]), len(rows), tiles[0].shape[-1], dtype=dtype)
    return torch.stack(tiles, 1, out=out)


def _write(rows: Sequence[Tensor], tile: slice, values_tND: Tensor) -> None:
    """The reverse of `_side_by_side`."""
    for row, values_tD in zip(rows, values_tND.unbind(1), strict=True):
        row[tile] = values_tD


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _dot(a_tD: Tensor, b_tD: Tensor) -> Tensor:
    return torch.bmm(a_tD.unsqueeze(1), b_tD.unsqueeze(2)).flatten()


def _or_zeros(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad
