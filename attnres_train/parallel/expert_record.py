"""What is logged of the routed experts: how even their load was, and what ranks sent for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from attnres_train.model.moe.balance import balance_of
from attnres_train.model.ports import TokenExchange
from attnres_train.parallel.gradients import sum_over
from attnres_train.parallel.ranks import Ranks


class ExpertRecord:
    """Of a training step: ``expert_bytes`` that all ranks sent to others, ``expert_overflow``, what
    found no room (if anything), and ``expert_entropy, expert_violation, expert_rank_load`` as
    `model.moe.balance.Balance` says."""

    def __init__(self, exchange: TokenExchange, ranks: Ranks) -> None:
        self.exchange, self.ranks = exchange, ranks
        self.sent = self.overflow = 0

    def begin(self) -> None:
        """A step begins."""
        self.sent = self.exchange.bytes_sent
        self.overflow = int(self.exchange.overflow)

    def why_not_finite(self) -> str:
        """Of a step whose loss is not finite: whether that is for want of room. Collective."""
        mine = torch.tensor(int(self.exchange.overflow) - self.overflow, device=self.ranks.device)
        lacking = int(sum_over(mine))
        if not lacking:
            return ""
        return (
            f"{lacking:,} tokens on their way to experts found no room: raise "
            "parallel.expert_capacity_factor, or set parallel.expert_dispatcher to exact"
        )

    def of_step(self, loads: Sequence[Tensor]) -> dict[str, float]:
        """Of the step since `begin`. ``loads`` are the tokens per expert of this stage's layers,
        summed over replicas. Collective over all ranks. Nothing of a model without experts."""
        sent = self.exchange.bytes_sent - self.sent
        balance = balance_of(loads, self.ranks.experts.size())
        overflow = int(self.exchange.overflow) - self.overflow
        mine = torch.tensor(
            [sent, overflow, *balance], dtype=torch.float64, device=self.ranks.device
        )
        rows = mine.new_empty(self.ranks.world_size, len(mine))
        dist.all_gather(list(rows), mine)
        total, lacking, num_layers, entropies, violations, rank_loads = rows.T
        if not num_layers.any():
            return {}
        record: dict[str, float] = (
            {} if not lacking.any() else {"expert_overflow": int(lacking.sum())}
        )
        return record | {
            "expert_entropy": float((num_layers * entropies).sum() / num_layers.sum()),
            "expert_violation": float(violations.max()),
            "expert_rank_load": float(rank_loads.max()),
            "expert_bytes": int(total.sum()),
        }
