"""Kimi Delta Attention, the operator (arXiv 2510.26692, Eq. 1 and 6-9).

Per head, with a decay per key channel, the state S [K, V] follows

    S <- diag(exp g_t) S;   S <- S + beta_t k_t (v_t - S^T k_t)^T;   o_t = S^T (scale q_t)

``chunk_kda`` runs it in chunks: within a chunk everything is batched matrix products, and only the
state passes from one chunk to the next. The products inside a chunk are made in `kda_tiles`.

Shapes: B batch, T tokens, H heads, K key size, V value size; C tokens per chunk, R = B H rows of
state, n chunks of a group, N = n R tiles of a group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from attnres_train.model.fla_backend import kda_kernel, run_kda_kernel
from attnres_train.model.kda_tiles import Tiles, from_tiles, to_tiles

# Chunks x batch x heads worked on at once: enough to batch, few enough to stay in cache.
_TILES_PER_GROUP = 32


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """KDA over whole sequences, in time and memory linear in T.

    ``q`` and ``k`` [B, T, H, K] are L2-normalised by the caller, ``v`` is [B, T, H, V], ``g`` the
    log of the decay [B, T, H, K] (at most 0, as strong as -inf), ``beta`` [B, T, H]. ``scale``
    multiplies q (default K**-0.5). Arithmetic is fp32, or fp64 if an input is. ``chunk_size`` is a
    power of two.

    ``cu_seqlens`` holds the cumulative lengths [0, ..., B*T] of documents packed into the rows: the
    state is empty at the start of each, and of each row. States then count documents, and B is 1.

    Returns ``o`` [B, T, H, V] in the dtype of v and, if asked for, the state behind the last token.
    States, ``initial_state`` too, are [B, H, K, V], with ``cu_seqlens`` [documents, H, K, V]. The
    backward pass keeps the inputs and one state per chunk, and recomputes the rest.
    """
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size must be a power of two, not {chunk_size}")
    has_states = initial_state is not None or output_final_state
    if cu_seqlens is not None and has_states and k.shape[0] != 1:
        raise ValueError(f"states of packed documents need a batch of 1, not {k.shape[0]}")
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    inputs, options = (q, k, v, g, beta), {"scale": scale, "chunk_size": chunk_size}
    kernel = kda_kernel(k, chunk_size)
    if kernel is not None:
        options |= {"output_final_state": output_final_state, "cu_seqlens": cu_seqlens}
        return run_kda_kernel(kernel, *inputs, initial_state=initial_state, **options)
    if cu_seqlens is not None and has_states:
        o, state = _each_document(inputs, cu_seqlens, initial_state, options)
    else:
        if cu_seqlens is not None:
            g = _reset_decay(g, cu_seqlens)
        chunk_size = min(chunk_size, 1 << (k.shape[1] - 1).bit_length())
        with torch.autocast(q.device.type, enabled=False):
            o, state = _ChunkKDA.apply(q, k, v, g, beta, initial_state, scale, chunk_size)
    return o, state if output_final_state else None


def _reset_decay(g: Tensor, cu_seqlens: Tensor) -> Tensor:
    """``g`` [B, T, H, K] with -inf at the first token of each document: nothing passes it."""
    starts = cu_seqlens[:-1].long()
    starts = starts[cu_seqlens.diff() > 0]
    return g.flatten(0, 1).index_fill(0, starts, -torch.inf).view_as(g)


def recurrent_kda_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence, for decoding.

    ``q``, ``k``, ``g`` [B, H, K], ``v`` [B, H, V], ``beta`` [B, H], ``state`` [B, H, K, V] (None:
    empty). Returns ``o`` [B, H, V] in the dtype of v and the new state in fp32 (fp64).
    """
    dtype = _compute_dtype(q, k, v, g, beta)
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    if state is None:
        state = q.new_zeros(*k.shape, v.shape[-1], dtype=dtype)
    q, k, u, g, beta = (x.to(dtype) for x in (q, k, v, g, beta))
    state = state * g.exp().unsqueeze(-1)
    u = beta.unsqueeze(-1) * (u - torch.einsum("bhk,bhkv->bhv", k, state))
    state = state + k.unsqueeze(-1) * u.unsqueeze(-2)
    o = torch.einsum("bhk,bhkv->bhv", scale * q, state)
    return o.to(v.dtype), state


def _each_document(
    inputs: tuple[Tensor, ...],
    cu_seqlens: Tensor,
    initial_state: Tensor | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """`chunk_kda` of one packed document after the other, for the sake of their states."""
    outputs, states = [], []
    lengths = cu_seqlens.diff().tolist()
    for i, document in enumerate(zip(*(x.split(lengths, 1) for x in inputs), strict=True)):
        start = None if initial_state is None else initial_state[i : i + 1]
        o, state = chunk_kda(*document, initial_state=start, output_final_state=True, **options)
        outputs.append(o)
        states.append(state)
    return torch.cat(outputs, dim=1), torch.cat(states)


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    wide = any(x.dtype == torch.float64 for x in tensors)
    return torch.float64 if wide else torch.float32


def _groups(num_chunks: int, rows: int) -> list[range]:
    """Ranges of chunks with about ``_TILES_PER_GROUP`` tiles each."""
    step = max(1, _TILES_PER_GROUP // rows)
    return [range(i, min(i + step, num_chunks)) for i in range(0, num_chunks, step)]


class _ChunkKDA(Function):
    """Saves the inputs and the state at the start of each chunk."""

    @staticmethod
    def forward(ctx, q, k, v, g, beta, initial_state, scale, chunk_size):
        batch, length, heads, key_size = k.shape
        rows, dtype = batch * heads, _compute_dtype(q, k, v, g, beta)
        num_chunks = -(-length // chunk_size)
        states = v.new_empty(num_chunks + 1, rows, key_size, v.shape[-1], dtype=dtype)
        states[0] = 0 if initial_state is None else initial_state.flatten(0, 1)
        o = torch.empty_like(v, memory_format=torch.contiguous_format)
        inputs = (q, k, v, g, beta)
        for chunks in _groups(num_chunks, rows):
            tiles = Tiles.build(inputs, chunks, chunk_size, dtype, for_backward=False)
            o_tiles = _forward_group(tiles, states[chunks.start : chunks.stop + 1], scale)
            from_tiles(o_tiles, o, chunks)
        ctx.save_for_backward(*inputs, states)
        ctx.scale, ctx.chunk_size = scale, chunk_size
        ctx.initial_dtype = None if initial_state is None else initial_state.dtype
        return o, states[-1].unflatten(0, (batch, heads)).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dstate):
        *inputs, states = ctx.saved_tensors
        chunk_size, dtype, state_shape = ctx.chunk_size, states.dtype, dstate.shape
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
        dstate = dstate.flatten(0, 1).to(dtype)
        for chunks in reversed(_groups(states.shape[0] - 1, states.shape[1])):
            tiles = Tiles.build(inputs, chunks, chunk_size, dtype, for_backward=True)
            do_tiles = to_tiles(do, chunks, chunk_size, dtype) * ctx.scale
            at_start = states[chunks.start : chunks.stop]
            dstate, tile_grads = _backward_group(tiles, at_start, do_tiles, dstate)
            for tile_grad, grad in zip(tile_grads, grads, strict=True):
                from_tiles(tile_grad, grad, chunks)
        if ctx.initial_dtype is None:
            return (*grads, None, None, None)
        return (*grads, dstate.view(state_shape).to(ctx.initial_dtype), None, None)


def _forward_group(tiles: Tiles, states: Tensor, scale: float) -> Tensor:
    """Outputs [N, C, V] of n chunks; fills ``states`` [n + 1, R, K, V] behind its first."""
    values = tiles.beta * tiles.v
    updates = torch.empty_like(values)
    reads = values.new_empty(values.shape[0], 2 * values.shape[1], values.shape[2])
    per_chunk = (
        x.split(states.shape[1])
        for x in (tiles.rows, tiles.keys.mT, tiles.inverse, tiles.decay, values, reads, updates)
    )
    for i, chunk in enumerate(zip(*per_chunk, strict=True)):
        rows, keys, inverse, decay, value, read, update = chunk
        torch.bmm(rows, states[i], out=read)
        torch.bmm(inverse, value + read[:, 1::2], out=update)
        torch.baddbmm(decay * states[i], keys, update, out=states[i + 1])
    return torch.baddbmm(reads[:, 0::2], tiles.scores, updates, beta=scale, alpha=scale)


def _backward_group(
    tiles: Tiles, states: Tensor, do: Tensor, dstate: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Gradients of the state before the group [R, K, V] and of its inputs, each as tiles.

    ``states`` [n, R, K, V] are those at the start of each chunk; ``do`` is [N, C, V], scaled.
    """
    flat_states = states.flatten(0, 1)
    values = torch.baddbmm(tiles.beta * tiles.v, tiles.rows[:, 1::2], flat_states)
    updates = tiles.inverse @ values

    dupdates = tiles.scores.mT @ do
    dreads = torch.stack((do, torch.empty_like(do)), dim=2).flatten(1, 2)
    dstates = torch.empty_like(states)
    per_chunk = [
        x.split(states.shape[1])
        for x in (tiles.rows.mT, tiles.keys, tiles.inverse.mT, tiles.decay, dupdates, dreads)
    ]
    for i in reversed(range(len(states))):
        rows, keys, inverse, decay, dupdate, dread = (x[i] for x in per_chunk)
        dstates[i] = dstate
        dread[:, 1::2] = inverse @ torch.baddbmm(dupdate, keys, dstate)
        dstate = torch.baddbmm(decay * dstate, rows, dread)

    dstates = dstates.flatten(0, 1)
    return dstate, tiles.input_grads(
        drows=dreads @ flat_states.mT,
        dkeys=updates @ dstates.mT,
        dscores=dreads @ updates.mT,
        dvalues=dreads[:, 1::2],
        ddecay=(flat_states * dstates).sum(-1),
    )
