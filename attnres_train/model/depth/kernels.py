"""Triton kernels of two-phase depth attention.

Shapes: D hidden_size, N sources, S queries, M tokens; all matrices are row-major [M, D]. Suffixes
of tiles name their axes: s queries, n sources (both padded to powers of two), d a block of D.

One program works on one token: it sweeps the token's rows twice, in blocks of D, first for the dot
products and then for the results. The second sweep finds the rows in the cache: those of one token
are tens of kilobytes, and few tokens are in flight at a time. A thread holds whole columns of an
[n, d] tile of up to 8 sources, so that sums over sources need no exchange between threads. Dot
products are fp32 multiply-adds (fp64 for fp64): a tensor core would round the queries.

Sources come as a tuple of pointers, padded to a power of two: no table of addresses to copy to the
device, and one compilation for all N between two powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnres_train.model.depth.tiles import (
    in_row,
    load,
    load_rows,
    row,
    row_pointers,
    softmax,
    store,
)


@triton.jit
def phase1_forward(
    queries,  # [S, D], in the dtype of the statistics
    sources,  # tuple of at least `count` pointers to [M, D]
    outputs,  # tuple of S pointers to [M, D]
    logits,  # [M, S, N]
    lse,  # [M, S]
    inv_rms,  # [M, N]
    count,  # N; no constexpr, so that one kernel serves every N of the same padding
    eps: tl.constexpr,  # as an argument it would be rounded to fp32, for fp64 too
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    S_PADDED: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    dtype: tl.constexpr = queries.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)  # times D it may exceed 32 bits
    s, n, d = tl.arange(0, S_PADDED), tl.arange(0, len(sources)), tl.arange(0, BLOCK)
    rows_n = row_pointers(sources, token, n, D, ALIGNMENT)

    squares_n = tl.zeros([len(sources)], dtype)
    dots_sn = tl.zeros([S_PADDED, len(sources)], dtype)
    for start in range(0, D, BLOCK):
        v_nd = load_rows(rows_n, n < count, start + d, D, dtype)
        squares_n += tl.sum(v_nd * v_nd, 1)
        for i in tl.static_range(len(outputs)):
            q_d = load(queries, i, start + d, D, dtype)
            dots_sn += in_row(i, s, tl.sum(v_nd * q_d[None, :], 1))

    # The key norm scales a whole source, and so its dot products: no normalised copy is made.
    inv_rms_n = tl.rsqrt(squares_n / D + eps)
    logits_sn = dots_sn * inv_rms_n[None, :]
    weights_sn, lse_s = softmax(logits_sn, n < count)
    at_sn = (token * len(outputs) + s[:, None]) * count + n[None, :]
    tl.store(logits + at_sn, logits_sn, mask=(s < len(outputs))[:, None] & (n < count)[None, :])
    tl.store(lse + token * len(outputs) + s, lse_s, mask=s < len(outputs))
    tl.store(inv_rms + token * count + n, inv_rms_n, mask=n < count)

    for start in range(0, D, BLOCK):
        v_nd = load_rows(rows_n, n < count, start + d, D, dtype)
        for i in tl.static_range(len(outputs)):
            weights_n = row(i, s, weights_sn)
            store(outputs[i], token, start + d, D, tl.sum(weights_n[:, None] * v_nd, 0))


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
    rows_n = row_pointers(sources, token, n, D, ALIGNMENT)
    grad_rows_n = row_pointers(grad_sources, token, n, D, ALIGNMENT)

    dots_sn = tl.zeros([S_PADDED, len(sources)], dtype)
    for start in range(0, D, BLOCK):
        v_nd = load_rows(rows_n, n < count, start + d, D, dtype)
        for i in tl.static_range(len(grad_outputs)):
            grad_d = load(grad_outputs[i], token, start + d, D, dtype)
            dots_sn += in_row(i, s, tl.sum(v_nd * grad_d[None, :], 1))

    at_sn = (token * len(grad_outputs) + s[:, None]) * count + n[None, :]
    mask_sn = (s < len(grad_outputs))[:, None] & (n < count)[None, :]
    logits_sn = tl.load(logits + at_sn, mask=mask_sn, other=0.0)
    at_s = grad_lse + token * len(grad_outputs) + s
    grad_lse_s = tl.load(at_s, mask=s < len(grad_outputs), other=0.0)
    inv_rms_n = tl.load(inv_rms + token * count + n, mask=n < count, other=0.0)
    # Weights come from the logits again, which the gradient needs anyway. Padding ends here: padded
    # queries have dots of 0, padded sources weights of 0, and neither any gradient.
    weights_sn, _ = softmax(logits_sn, n < count)
    mean_s = tl.sum(weights_sn * dots_sn, 1)
    # The softmax's gradient, and the log-sum-exp's: its derivative by a logit is the weight.
    grad_logits_sn = weights_sn * (dots_sn - mean_s[:, None] + grad_lse_s[:, None])
    along_query_sn = grad_logits_sn * inv_rms_n[None, :]
    # What the key norm adds is a multiple of the source, one for all queries (`logit_gradient`).
    along_source_n = tl.sum(along_query_sn * logits_sn, 0) * inv_rms_n / -D
    tl.store(along_query + at_sn, along_query_sn, mask=mask_sn)

    for start in range(0, D, BLOCK):
        v_nd = load_rows(rows_n, n < count, start + d, D, dtype)
        grad_nd = along_source_n[:, None] * v_nd
        for i in tl.static_range(len(grad_outputs)):
            q_d = load(queries, i, start + d, D, dtype)
            grad_d = load(grad_outputs[i], token, start + d, D, dtype)
            grad_nd += row(i, s, weights_sn)[:, None] * grad_d[None, :]
            grad_nd += row(i, s, along_query_sn)[:, None] * q_d[None, :]
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
    # Each program has its own part of `sums` to write: no atomic adds, whose order would vary.
    sums_sd = tl.zeros([S_PADDED, BLOCK], dtype)
    for start in range(split * TOKENS, tokens, splits * TOKENS):
        t = start + tl.arange(0, TOKENS)
        v_td = load_rows(row_pointers(sources, t, n, D, ALIGNMENT), t < tokens, d, D, dtype)
        for i in tl.static_range(S):
            at_t = along_query + (t * S + i) * count + n
            along_t = tl.load(at_t, mask=t < tokens, other=0.0)
            sums_sd += in_row(i, s, tl.sum(along_t[:, None] * v_td, 0))
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
    # A sum per column; threads add theirs up once, after the loop.
    squares_d, dots_d = tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], dtype)
    for start in range(0, D, BLOCK):
        v_d = load(partial, token, start + d, D, dtype)
        squares_d += v_d * v_d
        dots_d += v_d * load(query, 0, start + d, D, dtype)

    r = tl.rsqrt(tl.sum(squares_d, 0) / D + eps)
    own = tl.sum(dots_d, 0) * r
    b = 1 / (1 + tl.exp(tl.load(lse + token) - own))  # exp may be inf: b is 0 then, as it should
    tl.store(logit + token, own)
    tl.store(inv_rms + token, r)
    tl.store(weight + token, b)

    for start in range(0, D, BLOCK):
        read_d = load(read, token, start + d, D, dtype)
        v_d = load(partial, token, start + d, D, dtype)
        store(output, token, start + d, D, read_d + b * (v_d - read_d))


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
        v_d = load(partial, token, start + d, D, dtype)
        output_d = load(output, token, start + d, D, dtype)
        dots_d += load(grad, token, start + d, D, dtype) * (v_d - output_d)

    b, r = tl.load(weight + token), tl.load(inv_rms + token)
    grad_logit = b * tl.sum(dots_d, 0)  # why from the output: see `DepthMerge`
    along_q = grad_logit * r
    along_v = along_q * tl.load(logit + token) * r / -D
    tl.store(grad_lse + token, -grad_logit)
    tl.store(along_query + token, along_q)

    for start in range(0, D, BLOCK):
        grad_d = load(grad, token, start + d, D, dtype)
        q_d = load(query, 0, start + d, D, dtype)
        v_d = load(partial, token, start + d, D, dtype)
        store(grad_read, token, start + d, D, (1 - b) * grad_d)
        store(grad_partial, token, start + d, D, b * grad_d + along_q * q_d + along_v * v_d)
