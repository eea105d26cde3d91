"""Latent attention over what is cached of it: one latent and one shared key per token, from which
the keys and values of all heads follow.

Shapes: B batch, t queries, the last of T tokens, H heads, R latent size, N key size expanded from
the latent, E key size shared by all heads, V value size per head; n tokens of a tile.

The tokens are passed in tiles whose softmax is merged online, so that beside the latents no memory
grows with T. Of a tile either keys and values are expanded, n R H (N + V) multiply-adds, or queries
and outputs are taken to the latent's space ("absorbed", DeepSeek-V2, arXiv 2405.04434, section
2.1.2), which makes them R + E and R wide instead of N + E and V: the less for few queries.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SCORES = 1 << 22
"""Scores that are there at once: B H t n."""


def latent_attention(
    q: Tensor, latent: Tensor, shared: Tensor, weight: Tensor, begins: Tensor | None
) -> Tensor:
    """Causal attention of ``q`` [B, t, H, N+E] over ``latent`` [B, T, R] and ``shared`` [B, T, E],
    where ``weight`` [H, N+V, R] expands a latent to keys and values; [B, t, H, V] in the dtype of
    q. Sample b begins at token ``begins[b]`` (None: all at 0).

    Arithmetic is fp32 (fp64). No gradient.
    """
    batch, length, heads, _ = q.shape
    total, extra, rank = latent.shape[1], shared.shape[-1], latent.shape[-1]
    wide = torch.promote_types(q.dtype, torch.float32)
    nope = q.shape[-1] - extra
    to_keys, to_values = weight.to(wide).split([nope, weight.shape[1] - nope], dim=1)
    tile = max(1, _SCORES // (batch * heads * length))
    expands = length * (2 * rank - weight.shape[1]) > rank * weight.shape[1]
    with torch.autocast(q.device.type, enabled=False):
        scaled = q.to(wide).transpose(1, 2) * q.shape[-1] ** -0.5  # [B, H, t, N+E]
        own, common = scaled.split([nope, extra], dim=-1)
        if not expands:
            own = own @ to_keys  # [B, H, t, R]
        places = torch.arange(total, device=q.device)
        last_seen = places[total - length :, None]  # [t, 1]
        merged = _Merged(batch, heads, length, to_values.shape[1] if expands else rank, own)
        for start in range(0, total, tile):
            here = slice(start, min(start + tile, total))
            keys = latent[:, here].to(wide).unsqueeze(1)  # [B, 1, n, R]
            values = keys @ to_values.mT if expands else keys
            keys = keys @ to_keys.mT if expands else keys
            scores = own @ keys.mT + common @ shared[:, here].to(wide).unsqueeze(1).mT
            unseen = places[here] > last_seen  # [t, n]
            if begins is not None:
                unseen = unseen | (places[here] < begins[:, None])[:, None, None]
            merged.add(scores.masked_fill_(unseen, -torch.inf), values)
        o = merged.output()
        if not expands:
            o = o @ to_values.mT
    return o.transpose(1, 2).to(q.dtype)


class _Merged:
    """A softmax-weighted sum of values [B, H, t, W], tile by tile (online softmax)."""

    def __init__(self, batch: int, heads: int, length: int, width: int, like: Tensor) -> None:
        self.sums = like.new_zeros(batch, heads, length, width)
        self.total = like.new_zeros(batch, heads, length, 1)
        # Finite, so that a tile of which a query sees nothing is no difference of infinities.
        self.highest = torch.full_like(self.total, torch.finfo(like.dtype).min)

    def add(self, scores: Tensor, values: Tensor) -> None:
        """A tile: ``scores`` [B, H, t, n], -inf where not seen, ``values`` [B, 1 or H, n, W]."""
        highest = torch.maximum(self.highest, scores.amax(-1, keepdim=True))
        weights, before = (scores - highest).exp_(), (self.highest - highest).exp_()
        self.total = self.total * before + weights.sum(-1, keepdim=True)
        self.sums = self.sums * before + weights @ values
        self.highest = highest

    def output(self) -> Tensor:
        return self.sums / self.total
