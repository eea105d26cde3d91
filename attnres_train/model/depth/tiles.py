"""Tiles of the Triton kernels of depth attention: loads, stores, and rows of small matrices.

Suffixes of tiles name their axes: s queries, n sources, d a block of the hidden size D. Matrices in
memory are row-major, one token per row.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def softmax(logits_sn, exists_n):
    """Weights and log-sum-exp over the sources that exist."""
    logits_sn = tl.where(exists_n[None, :], logits_sn, float("-inf"))
    # Powers relative to the largest logit are at most 1, and their sum at least 1: no overflow, no
    # division by zero, as long as one source exists.
    top_s = tl.max(logits_sn, 1)
    powers_sn = tl.exp(logits_sn - top_s[:, None])
    total_s = tl.sum(powers_sn, 1)
    return powers_sn / total_s[:, None], top_s + tl.log(total_s)


@triton.jit
def row(i: tl.constexpr, s, values_sn):
    """Row ``i`` of a matrix: tiles cannot be indexed."""
    return tl.sum(tl.where((s == i)[:, None], values_sn, 0.0), 0)


@triton.jit
def in_row(i: tl.constexpr, s, values_n):
    """The matrix with ``values_n`` as row ``i`` and zeros elsewhere."""
    return tl.where((s == i)[:, None], values_n[None, :], 0.0)


@triton.jit
def row_pointers(matrices, token, n, D: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Pointers to the token's row in every matrix, each a multiple of ``ALIGNMENT`` bytes: the
    compiler cannot know that of a computed address, and would not load several elements at once."""
    element: tl.constexpr = matrices[0].dtype.element_ty
    # A tuple takes no index that is known at run time only: choose among its addresses, as numbers.
    bases_n = tl.where(n == 0, matrices[0].to(tl.int64), 0)
    for i in tl.static_range(1, len(matrices)):
        bases_n = tl.where(n == i, matrices[i].to(tl.int64), bases_n)
    return tl.multiple_of(bases_n.to(tl.pointer_type(element)) + token * D, ALIGNMENT)


@triton.jit
def load_rows(rows_n, exists_n, d, D: tl.constexpr, dtype: tl.constexpr):
    mask_nd = exists_n[:, None] & (d < D)[None, :]
    # Zeros add nothing to the sums over d, and a padded source has no weight.
    return tl.load(rows_n[:, None] + d[None, :], mask=mask_nd, other=0.0).to(dtype)


@triton.jit
def load(matrix, token, d, D: tl.constexpr, dtype: tl.constexpr):
    return tl.load(matrix + token * D + d, mask=d < D, other=0.0).to(dtype)


@triton.jit
def store(matrix, token, d, D: tl.constexpr, values_d):
    tl.store(matrix + token * D + d, values_d.to(matrix.dtype.element_ty), mask=d < D)
