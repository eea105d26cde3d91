"""One depth read as an autograd function that keeps no copy of a source, and the helpers it shares.

Shapes: D hidden_size, N sources, S queries, M tokens (all leading dimensions), t tokens of a tile.

Tokens are processed in tiles small enough that temporaries stay in cache: per pass each source is
read from memory once, and each gradient is written once. Saved for backward: references to the
sources, one inverse RMS and one logit per (source, token).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnres_train.model.autograd import Context

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
    def forward(
        ctx: Context, query_D: Tensor, eps: float, *sources: Tensor
    ) -> tuple[Tensor, Tensor]:
        (output,), logits_SNM, inv_rms_NM, _ = read_sources(query_D[None], eps, sources)
        logits_NM = logits_SNM[0]
        ctx.save_for_backward(query_D, logits_NM, inv_rms_NM, *sources)
        ctx.mark_non_differentiable(logits_NM)
        return output, logits_NM

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # Weights are not saved but made again from the logits, which the gradient needs anyway.
        query_D, logits_NM, inv_rms_NM, *sources = ctx.saved_tensors
        grad_query_D = torch.zeros_like(query_D)
        grad_sources = [contiguous_like(source) for source in sources]
        grad_MD, *sources_MD = rows(grad, *sources)
        targets_MD = rows(*grad_sources)
        with no_autocast(grad):
            for tile in tiles(sources_MD):
                grad_tD, *values = (x[tile].to(query_D.dtype) for x in (grad_MD, *sources_MD))
                logits_Nt, inv_rms_Nt = logits_NM[:, tile], inv_rms_NM[:, tile]
                weights_Nt, dots_Nt = logits_Nt.softmax(0), torch.empty_like(logits_Nt)
                sums = [sums_for(target_MD[tile], query_D.dtype) for target_MD in targets_MD]
                # A source's gradient depends on the dot products of all: two loops. The first has
                # the memory of the gradients, not yet written, for its products.
                for v_tD, sum_tD, dots_t in zip(values, sums, dots_Nt.unbind(), strict=True):
                    torch.sum(torch.mul(grad_tD, v_tD, out=sum_tD), -1, out=dots_t)
                # A logit moves the output by its weight times (its source - the output).
                grad_logits_Nt = weights_Nt * (dots_Nt - (weights_Nt * dots_Nt).sum(0))
                along_query_Nt, along_source_Nt = logit_gradient(
                    grad_logits_Nt, logits_Nt, inv_rms_Nt, len(query_D)
                )
                scales = (
                    x.unsqueeze(-1).unbind() for x in (weights_Nt, along_query_Nt, along_source_Nt)
                )
                for v_tD, target_MD, sum_tD, weight_t1, along_query_t1, along_source_t1 in zip(
                    values, targets_MD, sums, *scales, strict=True
                ):
                    torch.mul(grad_tD, weight_t1, out=sum_tD)
                    sum_tD.addcmul_(along_query_t1, query_D).addcmul_(along_source_t1, v_tD)
                    target_MD[tile].copy_(sum_tD)
                    grad_query_D.addmv_(v_tD.T, along_query_t1[:, 0])
        return grad_query_D, None, *grad_sources


def read_sources(
    queries_SD: Tensor, eps: float, sources: Sequence[Tensor]
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """S queries' attention over the same sources: outputs [..., D], logits [S, N, M], the sources'
    inverse RMS [N, M] and the logits' log-sum-exps [S, M]."""
    dim, dtype = queries_SD.shape[-1], queries_SD.dtype
    outputs = [contiguous_like(sources[0]) for _ in queries_SD]
    sources_MD, outputs_MD = rows(*sources), rows(*outputs)
    logits_SNM = queries_SD.new_empty(len(outputs), len(sources), len(sources_MD[0]))
    inv_rms_NM, lse_SM = torch.empty_like(logits_SNM[0]), torch.empty_like(logits_SNM[:, 0])
    with no_autocast(queries_SD):
        for tile in tiles(sources_MD):
            values = [v_MD[tile].to(dtype) for v_MD in sources_MD]
            logits_SNt, inv_rms_Nt = logits_SNM[..., tile], inv_rms_NM[:, tile]
            # All of one source before those of the next, while it is in the nearest cache. A matmul
            # would round a query's logits differently among others, that is in another pipeline.
            for v_tD, logits_St, norms_t in zip(
                values, logits_SNt.unbind(1), inv_rms_Nt.unbind(), strict=True
            ):
                torch.linalg.vector_norm(v_tD, dim=-1, out=norms_t)
                for query_D, logits_t in zip(queries_SD, logits_St, strict=True):
                    torch.mv(v_tD, query_D, out=logits_t)
            # Until here inv_rms holds norms. A key is normalised by scaling its logit instead.
            logits_SNt.mul_(inverse_rms(inv_rms_Nt, dim, eps))
            log_weights_SNt = logits_SNt.log_softmax(1)
            # A logit minus its log weight is the log-sum-exp, whichever source they are of. The
            # largest: those of a logit of -20,000, say, are both rounded to that size.
            lse_SM[:, tile] = logits_SNt.amax(1) - log_weights_SNt.amax(1)
            for output_MD, weights_Nt1 in zip(
                outputs_MD, log_weights_SNt.exp_().unsqueeze(-1).unbind(), strict=True
            ):
                _weighted_sum(values, weights_Nt1.unbind(), output_MD[tile])
    return outputs, logits_SNM, inv_rms_NM, lse_SM


def _weighted_sum(values: Sequence[Tensor], weights: Sequence[Tensor], target_tD: Tensor) -> None:
    """Writes the sum of weights [t, 1] times values [t, D] to the target, in any dtype."""
    sum_tD = torch.mul(values[0], weights[0], out=sums_for(target_tD, values[0].dtype))
    for v_tD, weight_t1 in zip(values[1:], weights[1:], strict=True):
        sum_tD.addcmul_(v_tD, weight_t1)
    target_tD.copy_(sum_tD)


def sums_for(target: Tensor, dtype: torch.dtype) -> Tensor:
    """Where to add up in ``dtype`` what is then copied to ``target``: the target itself if it has
    that dtype, and the copy does nothing."""
    return target if target.dtype == dtype else torch.empty_like(target, dtype=dtype)


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Matmuls in the dtype of their arguments, on the device of ``x``."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


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
    # By default torch would keep the strides of x; `rows` of a transposed one is a copy, and what
    # is written there would be lost.
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def inverse_rms(norm: Tensor, dim: int, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) of vectors x of ``dim`` elements, in place of their ``norm``."""
    return norm.square_().div_(dim).add_(eps).rsqrt_()
