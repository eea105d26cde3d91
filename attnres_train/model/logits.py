"""The largest attention logit of every head, without the matrix of all of them.

Shapes: B batch, T tokens here, T' all of a sample up to the last of them, H heads, K key size;
M = B H maps, t queries of the last of n keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnres_train.model.shares import Shares

_TILE_ROWS = 512
_GPU_TILE, _CPU_TILE = 2**26, 2**18
"""Logits that there are at once, if those of one map's rows are not more."""


@torch.no_grad()
def largest_logits(
    q: Tensor, k: Tensor, cu_seqlens: Tensor | None = None, shares: Shares | None = None
) -> Tensor:
    """Per head the largest scaled logit ``q k K^-0.5`` of the pairs that `model.mla` attends to:
    q [B, T, H, K], k [B, T', H, K] -> fp64 [H], exact but for the rounding of their dtype.

    Tile by tile, and nothing of what is masked: T^2 / 2 products of queries and keys per head of a
    sample, each written to memory and read back. ``cu_seqlens`` and ``shares`` as for
    `model.mla.causal_attention`.
    """
    found = [
        _of_maps(*(x.transpose(1, 2).flatten(0, 1) for x in (queries, k[seen])))
        .unflatten(0, (-1, q.shape[2]))
        .amax(0)
        for queries, seen in (shares or Shares()).causal(q, cu_seqlens)
    ]
    return torch.stack(found).amax(0).double() * q.shape[-1] ** -0.5


def _of_maps(q: Tensor, k: Tensor) -> Tensor:
    """[M, t, K], [M, n, K] -> [M]."""
    found = q.new_full((len(q),), -torch.inf)
    later = torch.ones(_TILE_ROWS, _TILE_ROWS, dtype=torch.bool, device=q.device).triu(1)
    most = _CPU_TILE if q.device.type == "cpu" else _GPU_TILE
    for start in range(0, q.shape[1], _TILE_ROWS):
        queries = q[:, start : start + _TILE_ROWS]
        rows = queries.shape[1]
        keys = k[:, : k.shape[1] - q.shape[1] + start + rows]
        at_once = max(1, most // (rows * keys.shape[1]))
        for first in range(0, len(q), at_once):
            maps = slice(first, first + at_once)
            logits = queries[maps] @ keys[maps].mT
            logits[..., -rows:].masked_fill_(later[:rows, :rows], -torch.inf)
            found[maps] = torch.maximum(found[maps], logits.amax((1, 2)))
    return found
