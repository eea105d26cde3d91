"""Launches the Triton kernels of depth attention, each as a torch operator that writes into tensors
it is given: `torch.compile` takes the operators as they are, without looking at the kernels.

Shapes: D hidden_size, N sources, S queries, M tokens (all leading dimensions, flattened by the
kernels). All tensors are contiguous; queries, logits and all else per token have the dtype of the
statistics.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor
from torch.library import custom_op

from attnres_train.model.depth import kernels

# The operators return nothing, so `torch.compile` needs no fake form of them, and what is kept for
# a backward pass is for their callers to decide.

TOKENS_PER_SPLIT = 256  # of a query's gradient: partial sums are small then beside the sources
_TOKENS_PER_TILE = 4  # rows of a source that `query_gradient` loads at once
_MAX_ELEMENTS = 64  # of a tile, per thread: more would not stay in registers


@custom_op(
    "attnres_train::depth_phase1_forward", mutates_args=("outputs", "logits", "lse", "inv_rms")
)
def phase1_forward(
    queries: Tensor,
    sources: list[Tensor],
    outputs: list[Tensor],
    logits: Tensor,
    lse: Tensor,
    inv_rms: Tensor,
    eps: float,
) -> None:
    """Writes S ``outputs`` [..., D], ``logits`` [..., S, N], ``lse`` [..., S], ``inv_rms`` [..., N]
    of ``queries`` [S, D] and N ``sources`` [..., D]."""
    arguments = (queries, _padded(sources), tuple(outputs), logits, lse, inv_rms, len(sources))
    options = _tile_options(len(queries), queries.shape[1], sources)
    # Here and below: Triton launches on the current device, wherever its arguments are.
    with torch.cuda.device_of(queries):
        kernels.phase1_forward[_tokens(sources[0]),](*arguments, eps=eps, **options)


@custom_op("attnres_train::depth_phase1_backward", mutates_args=("grad_sources", "along_query"))
def phase1_backward(
    queries: Tensor,
    sources: list[Tensor],
    grad_outputs: list[Tensor],
    grad_lse: Tensor,
    logits: Tensor,
    inv_rms: Tensor,
    grad_sources: list[Tensor],
    along_query: Tensor,
) -> None:
    """Writes ``grad_sources``, and ``along_query`` [..., S, N] for `query_gradient`."""
    given = (queries, _padded(sources), tuple(grad_outputs), grad_lse, logits, inv_rms)
    options = _tile_options(len(queries), queries.shape[1], sources)
    with torch.cuda.device_of(queries):
        kernels.phase1_backward[_tokens(sources[0]),](
            *given, _padded(grad_sources), along_query, len(sources), **options
        )


@custom_op("attnres_train::depth_query_gradient", mutates_args=("sums",))
def query_gradient(sources: list[Tensor], along_query: Tensor, sums: Tensor) -> None:
    """Writes ``sums`` [splits, N, S, D]: ``along_query`` [..., S, N] times the sources, summed over
    the tokens of each split."""
    splits, count, queries, dim = sums.shape
    options = _tile_options(queries, dim, sources) | _row_options(dim)
    grid = (triton.cdiv(dim, options["BLOCK"]), splits, count)
    arguments = (_padded(sources), along_query, sums, _tokens(sources[0]))
    with torch.cuda.device_of(sums):
        kernels.query_gradient[grid](*arguments, S=queries, TOKENS=_TOKENS_PER_TILE, **options)


@custom_op(
    "attnres_train::depth_merge_forward", mutates_args=("output", "logit", "inv_rms", "weight")
)
def merge_forward(
    query: Tensor,
    read: Tensor,
    lse: Tensor,
    partial: Tensor,
    output: Tensor,
    logit: Tensor,
    inv_rms: Tensor,
    weight: Tensor,
    eps: float,
) -> None:
    """Writes ``output`` [..., D] of ``query`` [D], ``read`` and ``partial`` [..., D], and logit,
    inverse RMS and attention weight of the partial, [...] like ``lse``."""
    arguments = (query, read, lse, partial, output, logit, inv_rms, weight)
    with torch.cuda.device_of(query):
        kernels.merge_forward[_tokens(partial),](*arguments, eps=eps, **_row_options(len(query)))


@custom_op(
    "attnres_train::depth_merge_backward",
    mutates_args=("grad_read", "grad_lse", "grad_partial", "along_query"),
)
def merge_backward(
    query: Tensor,
    partial: Tensor,
    output: Tensor,
    grad: Tensor,
    logit: Tensor,
    inv_rms: Tensor,
    weight: Tensor,
    grad_read: Tensor,
    grad_lse: Tensor,
    grad_partial: Tensor,
    along_query: Tensor,
) -> None:
    """Writes the three gradients, and ``along_query`` [...] for `query_gradient`."""
    saved = (query, partial, output, grad, logit, inv_rms, weight)
    written = (grad_read, grad_lse, grad_partial, along_query)
    with torch.cuda.device_of(query):
        kernels.merge_backward[_tokens(partial),](*saved, *written, **_row_options(len(query)))


def _tokens(x: Tensor) -> int:
    return x.shape[:-1].numel()


def _padded(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """As many as a power of two, so that a few compiled kernels serve any number of sources."""
    # The repeated one is a valid pointer that no kernel follows: what is beyond N is masked.
    missing = triton.next_power_of_2(len(tensors)) - len(tensors)
    return (*tensors, *[tensors[0]] * missing)


def _tile_options(queries: int, dim: int, sources: list[Tensor]) -> dict[str, int]:
    """Options of kernels with [N, d] or [S, d] tiles. Many rows leave each thread less of them."""
    row = _row_options(dim)
    elements = max(_MAX_ELEMENTS // triton.next_power_of_2(len(sources)), 1)
    return row | {
        "BLOCK": min(row["BLOCK"], 32 * row["num_warps"] * elements),
        "S_PADDED": triton.next_power_of_2(queries),
        # Rows begin at multiples of it; those of gradients too, which are new, aligned tensors.
        "ALIGNMENT": math.gcd(
            16, dim * sources[0].element_size(), *(x.data_ptr() for x in sources)
        ),
    }


def _row_options(dim: int) -> dict[str, int]:
    """Options of kernels with [d] tiles: 8 elements per thread, 16 bytes of bf16 in one load."""
    warps = 4 if dim >= 1024 else 1
    block = min(triton.next_power_of_2(dim), 256 * warps)
    # Fused multiply-adds are asked for: Triton's default depends on its version and environment.
    return {"D": dim, "BLOCK": block, "num_warps": warps, "enable_fp_fusion": True}
