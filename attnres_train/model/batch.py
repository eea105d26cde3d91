"""The input of a chunk. Shapes: B samples of a micro-batch, T tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class MicroBatch:
    """One micro-batch, the same on every pipeline rank.

    ``tokens`` and ``labels`` are int64 [B, T] (labels are the tokens one position later),
    ``loss_mask`` float [B, T] weights each position's loss. ``cu_seqlens`` int32 gives the
    cumulative document lengths [0, ..., B*T] of packed samples, None when every sample is one
    document.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    cu_seqlens: Tensor | None = None

    def to(self, device) -> MicroBatch:
        move = [None if x is None else x.to(device) for x in vars(self).values()]
        return MicroBatch(*move)
