"""QK-clip: heads of MLA whose attention logits grow beyond a threshold have their maps to queries
and keys scaled down after the optimizer's step (MuonClip: Kimi K2, arXiv 2507.20534, section 2.1).

Shapes: H heads here, N key size expanded from the latent, E key size shared by all heads, V value
size per head.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from attnres_train.model.mla import MultiHeadLatentAttention

Layers = Mapping[str, MultiHeadLatentAttention]
"""By the name of the module."""


def watched(chunk: nn.Module) -> Layers:
    """The MLA layers of a chunk, in order, which from now on keep `max_logits`."""
    layers = {
        name: module
        for name, module in chunk.named_modules()
        if isinstance(module, MultiHeadLatentAttention)
    }
    for layer in layers.values():
        nothing = torch.full((layer.heads,), -torch.inf, dtype=torch.float64)
        layer.max_logits = nothing.to(layer.q_proj.get_parameter("weight").device)
    return layers


def row_factors(layers: Layers, threshold: float) -> dict[str, Tensor]:
    """What the rows of each map to queries and keys are to be multiplied by, fp64 [rows, 1] under
    the parameter's name. With ``gamma = min(1, threshold / max_logits)`` of a head: sqrt(gamma) the
    N of its queries and keys, gamma the E of its queries, whose key all heads share. That one and
    the values stay; the head's logits become gamma times what they were."""
    return {
        f"{name}.{map_name}.weight": factors
        for name, layer in layers.items()
        for map_name, factors in _of_layer(layer, threshold).items()
    }


def _of_layer(layer: MultiHeadLatentAttention, threshold: float) -> dict[str, Tensor]:
    c, largest = layer.config, layer.max_logits
    assert largest is not None
    # Not min(1, .): where all logits are negative the quotient is too.
    gamma = torch.where(largest > threshold, threshold / largest, 1.0)
    root = gamma.sqrt()
    return {
        "q_proj": _rows((root, c.qk_nope_head_dim), (gamma, c.qk_rope_head_dim)),
        "kv_b_proj": _rows((root, c.qk_nope_head_dim), (torch.ones_like(root), c.v_head_dim)),
    }


def _rows(*parts: tuple[Tensor, int]) -> Tensor:
    """Of every head so many rows of each factor [H], one below the other."""
    return torch.cat([x.unsqueeze(1).expand(-1, rows) for x, rows in parts], dim=1).reshape(-1, 1)
