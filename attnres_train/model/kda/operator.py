"""Kimi Delta Attention, the operator (arXiv 2510.26692, Eq. 1 and 6-9).

Per head, with a decay per key channel, the state S [K, V] follows

    S <- diag(exp g_t) S;   S <- S + beta_t k_t (v_t - S^T k_t)^T;   o_t = S^T (scale q_t)

``chunk_kda`` runs it in chunks (`chunks`), ``recurrent_kda_step`` token by token.

Shapes: B batch, T tokens, H heads, K key size, V value size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnres_train.model.kda.chunks import ChunkKDA
from attnres_train.model.kda.fla import kda_kernel, run_kda_kernel
from attnres_train.model.kda.inputs import KDAInputs


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

    Returns ``o`` [B, T, H, V] in the dtype of v and, if asked for, the state after the last token.
    States, ``initial_state`` too, are [B, H, K, V], with ``cu_seqlens`` [documents, H, K, V]. The
    backward pass keeps the inputs and one state per chunk, and recomputes the rest.
    """
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size must be a power of two, not {chunk_size}")
    has_states = initial_state is not None or output_final_state
    if cu_seqlens is not None and has_states and k.shape[0] != 1:
        raise ValueError(f"states of packed documents need a batch of 1, not {k.shape[0]}")
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    inputs = KDAInputs(q, k, v, g, beta)
    kernel = kda_kernel(k, chunk_size)
    if kernel is not None:
        return run_kda_kernel(
            kernel,
            inputs,
            initial_state=initial_state,
            cu_seqlens=cu_seqlens,
            output_final_state=output_final_state,
            scale=scale,
            chunk_size=chunk_size,
        )
    if cu_seqlens is not None and has_states:
        o, state = _each_document(inputs, cu_seqlens, initial_state, scale, chunk_size)
    else:
        if cu_seqlens is not None:
            inputs = inputs._replace(g=_reset_decay(g, cu_seqlens))
        o, state = _in_chunks(inputs, initial_state, scale, chunk_size)
    return o, state if output_final_state else None


def _in_chunks(
    inputs: KDAInputs, initial_state: Tensor | None, scale: float, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Outputs and final states by `ChunkKDA`, in chunks no longer than the rows need."""
    # Down to the smallest power of two that holds a row: less padding where rows are short.
    chunk_size = min(chunk_size, 1 << (inputs.k.shape[1] - 1).bit_length())
    # The products inside would be cast to bf16; decays over a chunk need fp32.
    with torch.autocast(inputs.k.device.type, enabled=False):
        return ChunkKDA.apply(*inputs, initial_state, scale, chunk_size)


def _reset_decay(g: Tensor, cu_seqlens: Tensor) -> Tensor:
    """``g`` [B, T, H, K] with -inf at the first token of each document: nothing passes it."""
    tokens = g.shape[0] * g.shape[1]
    # The documents at the very end may be empty: they start after the last token.
    starts = torch.zeros(tokens + 1, dtype=torch.bool, device=g.device)
    starts = starts.index_fill(0, cu_seqlens[:-1].long(), True)[:-1]
    # exp(-inf) is 0 and the chunks are exact there: no pass over the documents one by one.
    return g.masked_fill(starts.view(*g.shape[:2], 1, 1), -torch.inf)


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
    """One token of the recurrence, for decoding, from the state that `chunk_kda` left or a step.

    ``q``, ``k``, ``g`` [B, H, K], ``v`` [B, H, V], ``beta`` [B, H], ``state`` [B, H, K, V] (None:
    empty). Returns ``o`` [B, H, V] in the dtype of v and the new state in fp32 (fp64).
    """
    dtype = KDAInputs(q, k, v, g, beta).compute_dtype
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    if state is None:
        state = q.new_zeros(*k.shape, v.shape[-1], dtype=dtype)
    q, k, u, g, beta = (x.to(dtype) for x in (q, k, v, g, beta))
    with torch.autocast(q.device.type, enabled=False):
        # The decay comes first: what the key already holds is read from the decayed state.
        state = state * g.exp().unsqueeze(-1)
        u = beta.unsqueeze(-1) * (u - torch.einsum("bhk,bhkv->bhv", k, state))
        state = state + k.unsqueeze(-1) * u.unsqueeze(-2)
        o = torch.einsum("bhk,bhkv->bhv", scale * q, state)
    return o.to(v.dtype), state


def _each_document(
    inputs: KDAInputs,
    cu_seqlens: Tensor,
    initial_state: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """`_in_chunks` of one packed document after the other, for the sake of their states."""
    outputs, states = [], []
    lengths = cu_seqlens.diff().tolist()
    for i, document in enumerate(zip(*(x.split(lengths, 1) for x in inputs), strict=True)):
        start = None if initial_state is None else initial_state[i : i + 1]
        o, state = _in_chunks(KDAInputs(*document), start, scale, chunk_size)
        outputs.append(o)
        states.append(state)
    return torch.cat(outputs, dim=1), torch.cat(states)
