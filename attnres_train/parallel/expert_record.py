"""What is logged of the routed experts: how even their load was, and what ranks sent for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from attnres_train.model.moe.balance import balance_of
from attnres_train.model.ports import TokenExchange
from attnres_train.parallel.ranks import Ranks


class ExpertRecord:
    """Of a training step: ``expert_bytes`` that all ranks sent to others, and ``expert_entropy,
    expert_violation, expert_rank_load`` as `model.moe.balance.Balance` says."""

    def __init__(self, exchange: TokenExchange, ranks: Ranks) -> None:
        self.exchange, self.ranks = exchange, ranks
        self.sent = 0

    def begin(self) -> None:
        """A step begins."""
        self.sent = self.exchange.bytes_sent

    def of_step(self, loads: Sequence[Tensor]) -> dict[str, float]:
        """Of the step since `begin`. ``loads`` are the tokens per expert of this stage's layers,
        summed over replicas. Collective over all ranks. Nothing of a model without experts."""
        sent = self.exchange.bytes_sent - self.sent
        balance = balance_of(loads, self.ranks.experts.size())
        mine = torch.tensor([sent, *balance], dtype=torch.float64, device=self.ranks.device)
        rows = mine.new_empty(self.ranks.world_size, len(mine))
        dist.all_gather(list(rows), mine)
        total, num_layers, entropies, violations, rank_loads = rows.T
        if not num_layers.any():
            return {}
        return {
            "expert_entropy": float((num_layers * entropies).sum() / num_layers.sum()),
            "expert_violation": float(violations.max()),
            "expert_rank_load": float(rank_loads.max()),
            "expert_bytes": int(total.sum()),
        }
