"""How evenly a step's tokens were spread over the experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Balance(NamedTuple):
    """Of the layers with experts of one stage; their number is the weight of the entropy."""

    num_layers: int = 0
    entropy: float = 0.0
    """Of the experts' shares of the tokens over that of even ones (1), mean over layers."""
    violation: float = 0.0
    """Largest load over the mean load, minus 1, of the worst layer and expert."""
    rank_load: float = 0.0
    """Load of the busiest rank over the mean of the ranks that share a layer's experts, of the
    worst layer."""


def balance_of(loads: Sequence[Tensor], ranks: int) -> Balance:
    """From every layer's tokens per expert, int64 [E], of the whole step; ``ranks`` share the
    experts. Without tokens everything is even."""
    if not loads:
        return Balance()
    share = torch.stack(list(loads)).double()
    experts = share.shape[1]
    share = share / share.sum(1, keepdim=True).clamp(min=1)
    entropy = torch.special.entr(share).sum(1) / math.log(experts) if experts > 1 else share.sum(1)
    of_ranks = share.view(len(share), ranks, -1).sum(2)
    found = torch.stack(
        [entropy.mean(), share.max() * experts - 1, of_ranks.max() * ranks]
    ).tolist()
    return Balance(len(loads), *found)
