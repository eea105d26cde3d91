"""Triton kernels of two-phase depth attention.

Shapes: D hidden_size, N sources, S queries, M tokens; all matrices are row-major [M, D]. Suffixes
of tiles name their axes: s queries, n sources (both padded to powers of two), d a block of D.

One program works on one token: it sweeps the token's rows twice, in blocks of D, first for the dot
products and then for the results. The second sweep finds the rows in the cache: those of one token
are tens of kilobytes, and few tokens are in flight at a time. A thread holds whole columns of an
[n, d] tile, so that sums over sources need no exchange between threads. Dot products are plain
fp32 multiply-adds (fp64 for fp64): with so few rows tensor cores would gain nothing, and round.

Sources come as a tuple of pointers, padded to a power of two: no table of addresses to copy to the
device, and one compilation for all N between two powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def phase1_forward(
    queries,  # [S, D], in the dtype of the statistics
    sources,  # tuple of at least `count` pointers to [M, D]
    outputs,  # tuple of S pointers to [M, D]
    logits,  # [M, S, N]
    lse,  # [M, S]
    inv_rms,  # [M, N]
    count,  # N
    eps: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    S_PADDED: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    dtype: tl.constexpr = queries.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    s, n, d = tl.arange(0, S_PADDED), tl.arange(0, len(sources)), tl.arange(0, BLOCK)
    rows_n = _row_pointers(sources, token, n, D, ALIGNMENT)

    squares_n = tl.zeros([len(sources)], dtype)
    dots_sn = tl.zeros([S_PADDED, len(sources)], dtype)
    for start in range(0, D, BLOCK):
        v_nd = _load_rows(rows_n, n < count, start + d, D, dtype)
        squares_n += tl.sum(v_nd * v_nd, 1)
        for i in tl.static_range(len(outputs)):
            q_d = _load(queries, i, start + d, D, dtype)
            dots_sn += _in_row(i, s, tl.sum(v_nd * q_d[None, :], 1))

    inv_rms_n = tl.rsqrt(squares_n / D + eps)
    logits_sn = dots_sn * inv_rms_n[None, :]
    weights_sn, lse_s = _softmax(logits_sn, n < count)
    at_sn = (token * len(outputs) + s[:, None]) * count + n[None, :]
    tl.store(logits + at_sn, logits_sn, mask=(s < len(outputs))[:, None] & (n < count)[None, :])
    tl.store(lse + token * len(outputs) + s, lse_s, mask=s < len(outputs))
    tl.store(inv_rms + token * count + n, inv_rms_n, mask=n < count)

    for start in range(0, D, BLOCK):
        v_nd = _load_rows(rows_n, n < count, start + d, D, dtype)
        for i in tl.static_range(len(outputs)):
            weights_n = _row(i, s, weights_sn)
            _store(outputs[i], token, start + d, D, tl.sum(weights_n[:, None] * v_nd, 0))


@triton.jit
def phase1_backward(
    queries,  # [S, D]
    sources,  # tuple of at least `count` pointers to [M, D]
    grad_outputs,  # tuple of S pointers to [M, D]
    grad_lse,  # [M, S]
    logits,  # [M, S, N]
    inv_rms,  # [M, N]
    grad_sources,  # tuple like `sources`, written
    along_query,  # [M, S, N], written: the coefficients that `query_gradient` takes
    count,  # N
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    S_PADDED: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    dtype: tl.constexpr = queries.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    s, n, d = tl.arange(0, S_PADDED), tl.arange(0, len(sources)), tl.arange(0, BLOCK)
    rows_n = _row_pointers(sources, token, n, D, ALIGNMENT)
    grad_rows_n = _row_pointers(grad_sources, token, n, D, ALIGNMENT)

    dots_sn = tl.zeros([S_PADDED, len(sources)], dtype)
    for start in range(0, D, BLOCK):
        v_nd = _load_rows(rows_n, n < count, start + d, D, dtype)
        for i in tl.static_range(len(grad_outputs)):
            grad_d = _load(grad_outputs[i], token, start + d, D, dtype)
            dots_sn += _in_row(i, s, tl.sum(v_nd * grad_d[None, :], 1))

    at_sn = (token * len(grad_outputs) + s[:, None]) * count + n[None, :]
    mask_sn = (s < len(grad_outputs))[:, None] & (n < count)[None, :]
    logits_sn = tl.load(logits + at_sn, mask=mask_sn, other=0.0)
    at_s = grad_lse + token * len(grad_outputs) + s
    grad_lse_s = tl.load(at_s, mask=s < len(grad_outputs), other=0.0)
    inv_rms_n = tl.load(inv_rms + token * count + n, mask=n < count, other=0.0)
    weights_sn, _ = _softmax(logits_sn, n < count)
    mean_s = tl.sum(weights_sn * dots_sn, 1)
    grad_logits_sn = weights_sn * (dots_sn - mean_s[:, None] + grad_lse_s[:, None])
    along_query_sn = grad_logits_sn * inv_rms_n[None, :]
    along_source_n = tl.sum(along_query_sn * logits_sn, 0) * inv_rms_n / -D
    tl.store(along_query + at_sn, along_query_sn, mask=mask_sn)

    for start in range(0, D, BLOCK):
        v_nd = _load_rows(rows_n, n < count, start + d, D, dtype)
        grad_nd = along_source_n[:, None] * v_nd
        for i in tl.static_range(len(grad_outputs)):
            q_d = _load(queries, i, start + d, D, dtype)
            grad_d = _load(grad_outputs[i], token, start + d, D, dtype)
            grad_nd += _row(i, s, weights_sn)[:, None] * grad_d[None, :]
            grad_nd += _row(i, s, along_query_sn)[:, None] * q_d[None, :]
        mask_nd = (n < count)[:, None] & (start + d < D)[None, :]
        pointers_nd = grad_rows_n[:, None] + (start + d)[None, :]
        tl.store(pointers_nd, grad_nd.to(grad_sources[0].dtype.element_ty), mask=mask_nd)


@triton.jit
def query_gradient(
    sources,  # tuple of at least N pointers to [M, D]
    along_query,  # [M, S, N]
    sums,  # [splits, N, S, D], written
    tokens,  # M
    S: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    S_PADDED: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """Program (i, j, n) sums block i of D over split j of the tokens, tiles t of ``TOKENS``, for
    source n. Sources are read once more here, which costs less than a running sum [S, D] in every
    program of `phase1_backward`, too large for registers."""
    dtype: tl.constexpr = sums.dtype.element_ty
    n, count = tl.program_id(2), tl.num_programs(2)
    split, splits = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    s, d = tl.arange(0, S_PADDED), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sums_sd = tl.zeros([S_PADDED, BLOCK], dtype)
    for start in range(split * TOKENS, tokens, splits * TOKENS):
        t = start + tl.arange(0, TOKENS)
        v_td = _load_rows(_row_pointers(sources, t, n, D, ALIGNMENT), t < tokens, d, D, dtype)
        for i in tl.static_range(S):
            at_t = along_query + (t * S + i) * count + n
            along_t = tl.load(at_t, mask=t < tokens, other=0.0)
            sums_sd += _in_row(i, s, tl.sum(along_t[:, None] * v_td, 0))
    at_sd = (((split * count + n) * S + s)[:, None]) * D + d[None, :]
    tl.store(sums + at_sd, sums_sd, mask=(s < S)[:, None] & (d < D)[None, :])


@triton.jit
def merge_forward(
    query,  # [D], in the dtype of the statistics
    read,  # [M, D]
    lse,  # [M]
    partial,  # [M, D]
    output,  # [M, D], written
    logit,  # [M], written
    inv_rms,  # [M], written
    weight,  # [M], written: that of the partial
    eps: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = query.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    squares_d, dots_d = tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], dtype)
    for start in range(0, D, BLOCK):
        v_d = _load(partial, token, start + d, D, dtype)
        squares_d += v_d * v_d
        dots_d += v_d * _load(query, 0, start + d, D, dtype)

    r = tl.rsqrt(tl.sum(squares_d, 0) / D + eps)
    own = tl.sum(dots_d, 0) * r
    b = 1 / (1 + tl.exp(tl.load(lse + token) - own))
    tl.store(logit + token, own)
    tl.store(inv_rms + token, r)
    tl.store(weight + token, b)

    for start in range(0, D, BLOCK):
        read_d = _load(read, token, start + d, D, dtype)
        v_d = _load(partial, token, start + d, D, dtype)
        _store(output, token, start + d, D, read_d + b * (v_d - read_d))


@triton.jit
def merge_backward(
    query,  # [D]
    partial,  # [M, D]
    output,  # [M, D]
    grad,  # [M, D]
    logit,  # [M]
    inv_rms,  # [M]
    weight,  # [M]
    grad_read,  # [M, D], written
    grad_lse,  # [M], written
    grad_partial,  # [M, D], written
    along_query,  # [M], written: the coefficients that `query_gradient` takes
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = query.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    dots_d = tl.zeros([BLOCK], dtype)
    for start in range(0, D, BLOCK):
        v_d = _load(partial, token, start + d, D, dtype)
        output_d = _load(output, token, start + d, D, dtype)
        dots_d += _load(grad, token, start + d, D, dtype) * (v_d - output_d)

    b, r = tl.load(weight + token), tl.load(inv_rms + token)
    grad_logit = b * tl.sum(dots_d, 0)
    along_q = grad_logit * r
    along_v = along_q * tl.load(logit + token) * r / -D
    tl.store(grad_lse + token, -grad_logit)
    tl.store(along_query + token, along_q)

    for start in range(0, D, BLOCK):
        grad_d = _load(grad, token, start + d, D, dtype)
        q_d = _load(query, 0, start + d, D, dtype)
        v_d = _load(partial, token, start + d, D, dtype)
        _store(grad_read, token, start + d, D, (1 - b) * grad_d)
        _store(grad_partial, token, start + d, D, b * grad_d + along_q * q_d + along_v * v_d)


@triton.jit
def _softmax(logits_sn, exists_n):
    """Weights and log-sum-exp over the sources that exist."""
    logits_sn = tl.where(exists_n[None, :], logits_sn, float("-inf"))
    top_s = tl.max(logits_sn, 1)
    powers_sn = tl.exp(logits_sn - top_s[:, None])
    total_s = tl.sum(powers_sn, 1)
    return powers_sn / total_s[:, None], top_s + tl.log(total_s)


@triton.jit
def _row(i: tl.constexpr, s, values_sn):
    """Row ``i`` of a matrix: tiles cannot be indexed."""
    return tl.sum(tl.where((s == i)[:, None], values_sn, 0.0), 0)


@triton.jit
def _in_row(i: tl.constexpr, s, values_n):
    """The matrix with ``values_n`` as row ``i`` and zeros elsewhere."""
    return tl.where((s == i)[:, None], values_n[None, :], 0.0)


@triton.jit
def _row_pointers(matrices, token, n, D: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Pointers to the token's row in every matrix, each a multiple of ``ALIGNMENT`` bytes: the
    compiler cannot know that of a computed address, and would not load several elements at once."""
    element: tl.constexpr = matrices[0].dtype.element_ty
    bases_n = tl.where(n == 0, matrices[0].to(tl.int64), 0)
    for i in tl.static_range(1, len(matrices)):
        bases_n = tl.where(n == i, matrices[i].to(tl.int64), bases_n)
    return tl.multiple_of(bases_n.to(tl.pointer_type(element)) + token * D, ALIGNMENT)


@triton.jit
def _load_rows(rows_n, exists_n, d, D: tl.constexpr, dtype: tl.constexpr):
    mask_nd = exists_n[:, None] & (d < D)[None, :]
    return tl.load(rows_n[:, None] + d[None, :], mask=mask_nd, other=0.0).to(dtype)


@triton.jit
def _load(matrix, row, d, D: tl.constexpr, dtype: tl.constexpr):
    return tl.load(matrix + row * D + d, mask=d < D, other=0.0).to(dtype)


@triton.jit
def _store(matrix, row, d, D: tl.constexpr, values_d):
    tl.store(matrix + row * D + d, values_d.to(matrix.dtype.element_ty), mask=d < D)
