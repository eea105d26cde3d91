"""A depth read and the norm after it in one kernel of flash-linear-attention, `fused_attnres` of
fla-core 0.6 and later, where that is installed and applies.

Shapes: D hidden_size. fla is imported on first use only: it needs Triton and a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes, fla asserts it of every source


def normed_read_kernel(
    sources: Sequence[Tensor], key_eps: float, norm_eps: float
) -> Callable[..., Tensor] | None:
    """fla's ``fused_attnres`` for ``sources`` [..., D]. None off the GPU, in fp64, for a single
    source (nothing to attend to), where the two norms differ in eps, of which fla takes one, for
    sources that are not aligned, and where fla has no such kernel."""
    first = sources[0]
    if not first.is_cuda or first.dtype == torch.float64:
        return None
    if len(sources) == 1 or key_eps != norm_eps:
        return None
    # Not by `data_ptr`, which `torch.compile` cannot trace; storages begin at such a multiple.
    if any(x.storage_offset() * x.element_size() % _ALIGNMENT for x in sources):
        return None
    try:
        from fla.ops.attnres import fused_attnres
    except ImportError:  # no fla, or one from before this kernel
        return None
    return fused_attnres


def run_normed_read(
    kernel: Callable[..., Tensor],
    query: Tensor,
    key_norm_weight: Tensor,
    sources: Sequence[Tensor],
    norm_weight: Tensor,
    eps: float,
) -> Tensor:
    """``rms_norm(depth_attention(...))``, [..., D] in the sources' dtype; ``query``,
    ``key_norm_weight`` and ``norm_weight`` are [D]. It is rounded once, after the norm's weight,
    where `rms_norm` rounds before it too. Backward keeps what that of `attention` keeps."""
    return kernel(query, list(sources), key_norm_weight, output_rms_weight=norm_weight, rms_eps=eps)
