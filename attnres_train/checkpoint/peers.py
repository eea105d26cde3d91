"""The processes that save or load together, or one process alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

Mine = TypeVar("Mine")
Result = TypeVar("Result")


class Peers:
    """The ranks of ``group`` (CPU-capable, e.g. gloo; None: all ranks), or this process alone where
    torch.distributed is not initialised. Every method is collective."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if self.distributed else 0
        self.size = dist.get_world_size(group) if self.distributed else 1

    def decide(self, mine: Mine, decision: Callable[[list[Mine]], Result]) -> Result:
        """Rank 0 calls ``decision`` with the list of every rank's ``mine``; its result, or its
        exception, reaches all ranks. No rank returns before every rank has called."""
        if not self.distributed:
            return decision([mine])
        values: list[Any] = [None] * self.size
        received = values if self.rank == 0 else None
        dist.gather_object(mine, received, group=self.group, group_dst=0)
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            # An error that left from here would let the others wait for the broadcast for ever.
            try:
                outcome = [decision(values), None]
            except Exception as error:
                outcome = [None, error]
        dist.broadcast_object_list(outcome, group=self.group, group_src=0)
        result, failure = outcome
        if failure is not None:
            raise failure
        return result

    def all_reduce_max(self, values: Tensor) -> None:
        """Make ``values``, on the CPU, the largest of all ranks', in place."""
        if self.distributed:
            dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)

    def on_first(self, action: Callable[[], Result]) -> Result:
        """Rank 0 calls ``action``; its result, or its exception, reaches all ranks."""
        return self.decide(None, lambda _: action())
