"""KDA of what a layer projects: the operator behind its gate, by whichever kernel applies.

Shapes: B batch, T tokens, H heads, K key size, V value size; R rows of t tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnres_train.model.kda.fla import gated_kda_kernel, kda_kernel, run_gated_kda_kernel
from attnres_train.model.kda.inputs import DecayGate, KDAInputs
from attnres_train.model.kda.operator import chunk_kda, recurrent_kda_step
from attnres_train.model.shares import cumulative


def gated_kda(
    raw: KDAInputs, gate: DecayGate, *, cu_seqlens: Tensor | None, chunk_size: int
) -> Tensor:
    """`chunk_kda` of what ``gate`` makes of ``raw``: o [B, T, H, V] in the dtype of v.

    A kernel that has norms and gates of its own gets the raw tensors.
    """
    return _gated_kda(raw, gate, None, cu_seqlens, chunk_size)[0]


def continued_kda(
    raw: KDAInputs, gate: DecayGate, states: Tensor, starts: Tensor | None, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """`gated_kda` over rows [R, t] that go on with ``states`` [R, H, K, V]: o [R, t, H, V] and the
    states after the rows. Documents start, with an empty state, where ``starts`` bool [R, t] says.
    """
    if starts is None and raw.k.shape[1] == 1 and not torch.is_grad_enabled():
        token = KDAInputs(*(x.squeeze(1) for x in gate.activate(raw)))
        o, after = recurrent_kda_step(*token, states)
        return o.unsqueeze(1), after
    if starts is None:
        o, after = _gated_kda(raw, gate, states, None, chunk_size)
    elif kda_kernel(raw.k, chunk_size) is None:
        inputs = gate.activate(raw)
        # Nothing passes such a decay, and ours is exact there: no pass over single documents.
        inputs = inputs._replace(g=inputs.g.masked_fill(starts[..., None, None], -torch.inf))
        o, after = chunk_kda(
            *inputs, initial_state=states, output_final_state=True, chunk_size=chunk_size
        )
    else:
        return by_documents(raw, gate, states, starts, chunk_size)
    assert after is not None  # it was asked for
    return o, after


def by_documents(
    raw: KDAInputs, gate: DecayGate, states: Tensor, starts: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """`continued_kda` for kernels that want a state for every document, in a batch of one."""
    cu_seqlens = cumulative(starts).long()
    begins, length = cu_seqlens[:-1], starts.shape[1]
    goes_on = ~starts.flatten()[begins]
    before = states[begins // length] * goes_on[:, None, None, None]
    flat = KDAInputs(*(x.flatten(0, 1).unsqueeze(0) for x in raw))
    o, after = _gated_kda(flat, gate, before, cu_seqlens, chunk_size)
    assert after is not None
    row_ends = torch.arange(1, len(starts) + 1, device=starts.device) * length
    return o.view_as(raw.v), after[torch.searchsorted(cu_seqlens, row_ends) - 1]


def _gated_kda(
    raw: KDAInputs,
    gate: DecayGate,
    states: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor | None]:
    """o and, where ``states`` are given, those at the end; all as in `chunk_kda`."""
    asked = states is not None
    kernel = gated_kda_kernel(raw.k, chunk_size)
    if kernel is None:
        inputs = gate.activate(raw)
        return chunk_kda(
            *inputs,
            initial_state=states,
            output_final_state=asked,
            cu_seqlens=cu_seqlens,
            chunk_size=chunk_size,
        )
    return run_gated_kda_kernel(
        kernel,
        raw,
        gate,
        initial_state=states,
        output_final_state=asked,
        cu_seqlens=cu_seqlens,
        chunk_size=chunk_size,
    )
