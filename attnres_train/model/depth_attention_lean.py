"""One depth read as an autograd function that keeps no copy of a source, and the helpers it shares.

Shapes: D hidden_size, N sources, M tokens (all leading dimensions), t tokens of a tile.

Tokens are processed in tiles small enough that temporaries stay in cache: per pass each source is
read from memory once, and each gradient is written once. Saved for backward: references to the
sources, one inverse RMS and one logit per (source, token).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_TILE_BYTES_CPU = (
    4 << 20
)  # of the last-level cache; smaller tiles lose more in calls than they gain
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
                inv_rms_Nt = torch.stack([inverse_rms(v_tD, eps) for v_tD in values])
                logits_Nt = torch.stack([v_tD @ query_D for v_tD in values]) * inv_rms_Nt
                weights_Nt1 = logits_Nt.softmax(0).unsqueeze(-1)
                with writing(output_MD[tile], query_D.dtype) as o_tD:
                    torch.mul(values[0], weights_Nt1[0], out=o_tD)
                    for v_tD, weight_t1 in zip(values[1:], weights_Nt1[1:], strict=True):
                        o_tD.addcmul_(v_tD, weight_t1)
                logits_NM[:, tile], inv_rms_NM[:, tile] = logits_Nt, inv_rms_Nt
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
        grads_MD = rows(*grad_sources)
        with torch.autocast(grad.device.type, enabled=False):
            for tile in tiles(sources_MD):
                values = [v_MD[tile].to(query_D.dtype) for v_MD in sources_MD]
                grad_tD = grad_MD[tile].to(query_D.dtype)
                logits_Nt, inv_rms_Nt = logits_NM[:, tile], inv_rms_NM[:, tile]
                weights_Nt = logits_Nt.softmax(0)
                dots_Nt = torch.stack([(grad_tD * v_tD).sum(-1) for v_tD in values])
                grad_logits_Nt = weights_Nt * (dots_Nt - (weights_Nt * dots_Nt).sum(0))
                along_query_Nt, along_source_Nt = logit_gradient(
                    grad_logits_Nt, logits_Nt, inv_rms_Nt, len(query_D)
                )
                for n, v_tD in enumerate(values):
                    with writing(grads_MD[n][tile], query_D.dtype) as grad_v_tD:
                        torch.outer(along_query_Nt[n], query_D, out=grad_v_tD)
                        grad_v_tD.addcmul_(v_tD, along_source_Nt[n, :, None])
                        grad_v_tD.addcmul_(grad_tD, weights_Nt[n, :, None])
                    grad_query_D.addmv_(v_tD.T, along_query_Nt[n])
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
    tokens, dim = matrices[0].shape
    on_cpu = matrices[0].device.type == "cpu"
    budget = _TILE_BYTES_CPU if on_cpu else _TILE_BYTES_DEVICE
    size = max(1, budget // (4 * dim * len(matrices)))
    return (slice(start, start + size) for start in range(0, tokens, size))


@contextmanager
def writing(target: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """A tensor of ``dtype`` to compute ``target`` in: itself, or a buffer copied to it at exit."""
    if target.dtype == dtype:
        yield target
    else:
        buffer = torch.empty_like(target, dtype=dtype)
        yield buffer
        target.copy_(buffer)


def contiguous_like(x: Tensor) -> Tensor:
    """Uninitialised, row-major."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dimension."""
    norm = torch.linalg.vector_norm(x, dim=-1)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
