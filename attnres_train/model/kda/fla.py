"""KDA by flash-linear-attention's Triton kernels, where they are installed and apply.

fla is imported on first use only: it needs Triton and a GPU.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnres_train.model.kda.inputs import DecayGate, KDAInputs

_CHUNK_SIZES = (32, 64)  # of fla's kernels
_MAX_KEY_SIZE = 256
_SAFE_LOWER_BOUND = -5.0  # down to here fla multiplies by powers of the decay on tensor cores
_GATES = ("use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel")


def kda_kernel(k: Tensor, chunk_size: int) -> Callable[..., Any] | None:
    """fla's ``chunk_kda`` for keys like ``k`` [B, T, H, K]; None off the GPU, in fp64, at sizes
    that fla does not cover, and where fla is not installed."""
    if not k.is_cuda or k.dtype == torch.float64 or k.shape[-1] > _MAX_KEY_SIZE:
        return None
    if chunk_size not in _CHUNK_SIZES:
        return None
    try:
        from fla.ops.kda import chunk_kda
    except ImportError:  # no fla, or one from before KDA
        return None
    return chunk_kda


def gated_kda_kernel(k: Tensor, chunk_size: int) -> Callable[..., Any] | None:
    """`kda_kernel` if it also computes the L2 norms, both forms of the decay and the sigmoid of
    beta, as that of fla-core 0.6 does."""
    kernel = kda_kernel(k, chunk_size)
    if kernel is None:
        return None
    offered = inspect.signature(kernel).parameters
    return kernel if all(name in offered for name in (*_GATES, "lower_bound")) else None


def run_gated_kda_kernel(
    kernel: Callable[..., Any],
    raw: KDAInputs,
    gate: DecayGate,
    *,
    initial_state: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """o [B, T, H, V] of ``raw``, as it leaves its projections, under ``gate``, and the state as in
    `chunk_kda`. The backward pass recomputes the decay, so that no [B, T, H, K] of fp32 is kept for
    it."""
    bound = gate.lower_bound
    options |= gate._asdict() | dict.fromkeys(_GATES, True)
    options |= {
        "A_log": gate.A_log.flatten(),
        "safe_gate": bound is not None and bound >= _SAFE_LOWER_BOUND,
    }
    return run_kda_kernel(kernel, raw, initial_state=initial_state, **options)


def run_kda_kernel(
    kernel: Callable[..., Any],
    inputs: KDAInputs,
    *,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Calls ``kernel`` with our `chunk_kda`'s arguments.

    fla wants q, k and v in one dtype, an fp32 state, and packed documents in a batch of one:
    several rows are laid end to end, with a document border between them.
    """
    v = inputs.v
    inputs = inputs._replace(q=inputs.q.to(v.dtype), k=inputs.k.to(v.dtype))
    if initial_state is not None:
        initial_state = initial_state.float()
    if cu_seqlens is None:
        return kernel(*inputs, initial_state=initial_state, **options)
    batch, length = v.shape[:2]
    borders = torch.arange(0, batch * length + 1, length, device=cu_seqlens.device)
    if batch > 1:  # `unique` sorts too
        cu_seqlens = torch.cat((cu_seqlens, borders.to(cu_seqlens))).unique()
    flat = [x.flatten(0, 1).unsqueeze(0) for x in inputs]
    o, state = kernel(*flat, initial_state=initial_state, cu_seqlens=cu_seqlens.long(), **options)
    return o.view_as(v), state
