"""The processes that save or load together, or one process alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist


class Peers:
    """The ranks of ``group`` (CPU-capable, e.g. gloo; None: all ranks), or this process alone where
    torch.distributed is not initialised. Every method is collective."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if self.distributed else 0
        self.size = dist.get_world_size(group) if self.distributed else 1

    def decide(self, mine: Any, decision: Callable[[list], Any]) -> Any:
        """Rank 0 calls ``decision`` with the list of every rank's ``mine``; its result, or its
        exception, reaches all ranks. No rank returns before every rank has called."""
        if not self.distributed:
            return decision([mine])
        values: list | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(mine, values, group=self.group, group_dst=0)
        outcome: list = [None, None]
        if self.rank == 0:
            try:
                outcome = [decision(values), None]
            except Exception as error:
                outcome = [None, error]
        dist.broadcast_object_list(outcome, group=self.group, group_src=0)
        result, error = outcome
        if error is not None:
            raise error
        return result

    def on_first(self, action: Callable[[], Any]) -> Any:
        """Rank 0 calls ``action``; its result, or its exception, reaches all ranks."""
        return self.decide(None, lambda _: action())
