"""One depth read as an autograd function that keeps no copy of a source, and the helpers it shares.

Shapes: D hidden_size, N sources, M tokens (all leading dimensions), t tokens of a tile.

Tokens are processed in tiles small enough that temporaries stay in cache: per pass each source is
read from memory once, and each gradient is written once. Saved for backward: references to the
sources, one inverse RMS and one logit per (source, token).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Of the last-level cache; smaller tiles lose more in calls than they gain.
_TILE_BYTES_CPU = 4 << 20
_TILE_BYTES_DEVICE = 64 << 20  # large enough that kernel launches do not dominate


class DepthRead(torch.autograd.Function):
    """One query's attention over the sources.

    ``apply(query [D], eps, *sources [..., D])``, the query already times the key norm weight and in
    the dtype of the statistics, returns the output [..., D] in the sources' dtype and the logits
    [N, M] (no gradient).
    """

    @staticmethod
    def forward(ctx, query_D: Tensor, eps: float, *sources: Tensor) -> tuple[Tensor, Tensor]:
        output = contiguous_like(sources[0])
        output_MD, *sources_MD = rows(output, *sources)
        logits_NM = query_D.new_empty(len(sources), len(output_MD))
        inv_rms_NM = torch.empty_like(logits_NM)
        with torch.autocast(output.device.type, enabled=False):
            for tile in tiles(sources_MD):
                values = [v_MD[tile].to(query_D.dtype) for v_MD in sources_MD]
                # Both of one source before those of the next, while it is in the nearest cache.
                pairs = [
                    (torch.linalg.vector_norm(v_tD, dim=-1), v_tD @ query_D) for v_tD in values
                ]
                norms_Nt, dots_Nt = map(torch.stack, zip(*pairs, strict=True))
                inv_rms_Nt = inverse_rms(norms_Nt, len(query_D), eps)
                logits_Nt = dots_Nt.mul_(inv_rms_Nt)
                logits_NM[:, tile], inv_rms_NM[:, tile] = logits_Nt, inv_rms_Nt
                first, *others = logits_Nt.softmax(0).unsqueeze(-1).unbind()
                sum_tD = values[0] * first
                for v_tD, weight_t1 in zip(values[1:], others, strict=True):
                    sum_tD.addcmul_(v_tD, weight_t1)
                output_MD[tile] = sum_tD
        ctx.save_for_backward(query_D, logits_NM, inv_rms_NM, *sources)
        ctx.mark_non_differentiable(logits_NM)
        return output, logits_NM

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _) -> tuple[Tensor | None, ...]:
        query_D, logits_NM, inv_rms_NM, *sources = ctx.saved_tensors
        grad_query_D = torch.zeros_like(query_D)
        grad_sources = [contiguous_like(source) for source in sources]
        grad_MD, *sources_MD = rows(grad, *sources)
        targets_MD = rows(*grad_sources)
        with torch.autocast(grad.device.type, enabled=False):
            for tile in tiles(sources_MD):
                grad_tD, *values = (x[tile].to(query_D.dtype) for x in (grad_MD, *sources_MD))
                logits_Nt, inv_rms_Nt = logits_NM[:, tile], inv_rms_NM[:, tile]
                weights_Nt = logits_Nt.softmax(0)
                dots_Nt = torch.stack([torch.linalg.vecdot(grad_tD, v_tD) for v_tD in values])
                grad_logits_Nt = weights_Nt * (dots_Nt - (weights_Nt * dots_Nt).sum(0))
                along_query_Nt, along_source_Nt = logit_gradient(
                    grad_logits_Nt, logits_Nt, inv_rms_Nt, len(query_D)
                )
                scales = along_query_Nt, along_source_Nt.unsqueeze(-1), weights_Nt.unsqueeze(-1)
                for v_tD, target_MD, along_query_t, along_source_t1, weight_t1 in zip(
                    values, targets_MD, *scales, strict=True
                ):
                    through_logit_tD = torch.outer(along_query_t, query_D)
                    through_logit_tD.addcmul_(v_tD, along_source_t1)
                    torch.addcmul(through_logit_tD, grad_tD, weight_t1, out=target_MD[tile])
                    grad_query_D.addmv_(v_tD.T, along_query_t)
        return grad_query_D, None, *grad_sources


def logit_gradient(
    grad_logit: Tensor, logit: Tensor, inv_rms: Tensor, dim: int
) -> tuple[Tensor, Tensor]:
    """Coefficients of the query and of the source in the gradient that reaches a source through its
    logit l = r (u . v), r = (mean(v^2) + eps)^(-1/2), which is dl/dv = r u - (l r^2 / D) v. The
    first is also that of the source in the query's gradient, dl/du = r v."""
    along_query = grad_logit * inv_rms
    return along_query, along_query * logit * inv_rms / -dim


def rows(*tensors: Tensor) -> list[Tensor]:
    """The tensors as matrices of one token per row, without a copy where strides allow."""
    return [x.reshape(-1, x.shape[-1]) for x in tensors]


def tiles(matrices: Sequence[Tensor]) -> Iterator[slice]:
    """Slices of tokens over which the matrices [M, D] together, in fp32, fill one tile's bytes."""
    tokens, size = len(matrices[0]), tile_size(matrices)
    return (slice(start, start + size) for start in range(0, tokens, size))


def tile_size(matrices: Sequence[Tensor]) -> int:
    """Number of tokens of such a tile, M at most, 1 at least."""
    tokens, dim = matrices[0].shape
    on_cpu = matrices[0].device.type == "cpu"
    budget = _TILE_BYTES_CPU if on_cpu else _TILE_BYTES_DEVICE
    return max(1, min(tokens, budget // (4 * dim * len(matrices))))


def contiguous_like(x: Tensor) -> Tensor:
    """Uninitialised, row-major."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def inverse_rms(norm: Tensor, dim: int, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) of vectors x of ``dim`` elements, in place of their ``norm``."""
    return norm.square_().div_(dim).add_(eps).rsqrt_()
