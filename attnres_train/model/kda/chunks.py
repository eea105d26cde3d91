"""KDA over chunks of tokens: forward and backward of `kda.chunk_kda`.

Within a chunk everything is batched matrix products, and only the state passes from one chunk to
the next. The products inside a chunk are made in `tiles`. Both directions are custom operators,
so that `torch.compile` takes each as one node, however many chunks there are.

Shapes: B batch, T tokens, H heads, K key size, V value size; C tokens per chunk, R = B H rows of
state, n chunks of a group, N = n R tiles of a group.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable
from torch.library import custom_op

from attnres_train.model.autograd import Context
from attnres_train.model.kda.inputs import KDAInputs
from attnres_train.model.kda.tiles import Tiles, from_tiles, to_tiles

# Chunks x batch x heads worked on at once: enough to batch, few enough to stay in cache. The
# backward pass has about 40 tensors of their size, 20 MiB at C = K = V = 64 in fp32, whatever T is.
_TILES_PER_GROUP = 32


class _ChunkContext(Context, Protocol):
    scale: float
    chunk_size: int
    initial_dtype: torch.dtype | None


class ChunkKDA(Function):
    """`kda.chunk_kda` with one state per row. Saves the inputs and the state at the start of each
    chunk."""

    @staticmethod
    def forward(
        ctx: _ChunkContext,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor | None,
        scale: float,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        inputs = KDAInputs(q, k, v, g, beta)
        o, states = _forward([*inputs], initial_state, scale, chunk_size)
        # Of what is inside the chunks nothing: the backward pass makes it again, group by group.
        ctx.save_for_backward(*inputs, states)
        ctx.scale, ctx.chunk_size = scale, chunk_size
        ctx.initial_dtype = None if initial_state is None else initial_state.dtype
        # A copy: a view would keep the states of all chunks for as long as the last one is wanted.
        return o, states[-1].unflatten(0, k.shape[::2]).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: _ChunkContext, do: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, states = ctx.saved_tensors
        *grads, dstate_in = _backward(inputs, states, do, dstate, ctx.scale, ctx.chunk_size)
        dinitial = None if ctx.initial_dtype is None else dstate_in.to(ctx.initial_dtype)
        return (*grads, dinitial, None, None)


@custom_op("attnres_train::chunk_kda", mutates_args=())
def _forward(
    inputs: list[Tensor], initial_state: Tensor | None, scale: float, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """o [B, T, H, V] and the states [chunks + 1, R, K, V] around the chunks."""
    o, states = _empty_results(inputs, initial_state, scale, chunk_size)
    states[0] = 0 if initial_state is None else initial_state.flatten(0, 1)
    for chunks in _groups(states):
        tiles = Tiles.build(inputs, chunks, chunk_size, states.dtype, for_backward=False)
        o_tiles = _forward_group(tiles, states[chunks.start : chunks.stop + 1], scale)
        from_tiles(o_tiles, o, chunks)
    return o, states


@_forward.register_fake
def _empty_results(
    inputs: list[Tensor], initial_state: Tensor | None, scale: float, chunk_size: int
) -> tuple[Tensor, Tensor]:
    # Serves twice: memory for the operator to fill, and its fake form for `torch.compile`, which
    # wants shapes and strides only.
    k, v, dtype = inputs[1], inputs[2], KDAInputs(*inputs).compute_dtype
    batch, length, heads, key_size = k.shape
    num_states = -(-length // chunk_size) + 1
    states = v.new_empty(num_states, batch * heads, key_size, v.shape[-1], dtype=dtype)
    return torch.empty_like(v, memory_format=torch.contiguous_format), states


@custom_op("attnres_train::chunk_kda_backward", mutates_args=())
def _backward(
    inputs: list[Tensor],
    states: Tensor,
    do: Tensor,
    dstate: Tensor,
    scale: float,
    chunk_size: int,
) -> list[Tensor]:
    """Gradients of the inputs and of the first state [B, H, K, V], given that of the last."""
    *grads, dfirst = _empty_gradients(inputs, states, do, dstate)
    dstate = dstate.flatten(0, 1).to(states.dtype)
    for chunks in reversed(_groups(states)):
        tiles = Tiles.build(inputs, chunks, chunk_size, states.dtype, for_backward=True)
        do_tiles = to_tiles(do, chunks, chunk_size, states.dtype) * scale
        at_start = states[chunks.start : chunks.stop]
        dstate, tile_grads = _backward_group(tiles, at_start, do_tiles, dstate)
        for tile_grad, grad in zip(tile_grads, grads, strict=True):
            from_tiles(tile_grad, grad, chunks)
    dfirst.copy_(dstate.view_as(dfirst))
    return [*grads, dfirst]


@_backward.register_fake
def _empty_gradients(
    inputs: list[Tensor], states: Tensor, do: Tensor, dstate: Tensor, *_: float
) -> list[Tensor]:
    results = [*inputs, dstate.to(states.dtype)]
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in results]


def _groups(states: Tensor) -> list[range]:
    """Ranges of chunks with about ``_TILES_PER_GROUP`` tiles each."""
    num_chunks, step = len(states) - 1, max(1, _TILES_PER_GROUP // states.shape[1])
    return [range(i, min(i + step, num_chunks)) for i in range(0, num_chunks, step)]


def _forward_group(tiles: Tiles, states: Tensor, scale: float) -> Tensor:
    """Outputs [N, C, V] of n chunks; fills ``states`` [n + 1, R, K, V] after its first."""
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
        # beta (v - S^T k) with the state at the start of the chunk; the inverse takes from it what
        # earlier tokens of the chunk have written since.
        torch.bmm(inverse, value + read[:, 1::2], out=update)
        torch.baddbmm(decay * states[i], keys, update, out=states[i + 1])
    return torch.baddbmm(reads[:, 0::2], tiles.scores, updates, beta=scale, alpha=scale)


def _backward_group(
    tiles: Tiles, states: Tensor, do: Tensor, dstate: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Gradients of the state before the group [R, K, V] and of its inputs, each as tiles.

    ``states`` [n, R, K, V] are those at the start of each chunk; ``do`` is [N, C, V], scaled.
    """
    # The updates of the forward pass, of all chunks at once: their states are known by now.
    flat_states = states.flatten(0, 1)
    values = torch.baddbmm(tiles.beta * tiles.v, tiles.rows[:, 1::2], flat_states)
    updates = tiles.inverse @ values

    dupdates = tiles.scores.mT @ do
    # Two readers in turn, as in the rows: those of q are known, those of -beta k come in the loop.
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
