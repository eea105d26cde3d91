"""KDA by flash-linear-attention's Triton kernels, where they are installed and apply.

fla is imported on first use only: it needs Triton and a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_CHUNK_SIZES = (32, 64)  # of fla's kernels
_MAX_KEY_SIZE = 256


def kda_kernel(k: Tensor, chunk_size: int) -> Callable[..., Any] | None:
    """fla's ``chunk_kda`` for keys like ``k`` [B, T, H, K]; None off the GPU, in fp64, at sizes
    that fla does not cover, and where fla is not installed."""
    if not k.is_cuda or k.dtype == torch.float64 or k.shape[-1] > _MAX_KEY_SIZE:
        return None
    if chunk_size not in _CHUNK_SIZES:
        return None
    try:
        from fla.ops.kda import chunk_kda
    except ImportError:
        return None
    return chunk_kda


def run_kda_kernel(
    kernel: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Calls ``kernel`` with our `chunk_kda`'s arguments.

    fla wants q, k and v in one dtype, an fp32 state, and packed documents in a batch of one:
    several rows are laid end to end, with a document border between them.
    """
    q, k = q.to(v.dtype), k.to(v.dtype)
    if initial_state is not None:
        initial_state = initial_state.float()
    if cu_seqlens is None:
        return kernel(q, k, v, g, beta, initial_state=initial_state, **options)
    batch, length = v.shape[:2]
    borders = torch.arange(0, batch * length + 1, length, device=cu_seqlens.device)
    if batch > 1:
        cu_seqlens = torch.cat((cu_seqlens, borders.to(cu_seqlens))).unique()
    flat = [x.flatten(0, 1).unsqueeze(0) for x in (q, k, v, g, beta)]
    o, state = kernel(*flat, initial_state=initial_state, cu_seqlens=cu_seqlens.long(), **options)
    return o.view_as(v), state
