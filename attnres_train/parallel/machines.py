"""What one process of a machine has found out, for the others there."""

from __future__ import annotations

import socket
from typing import TypeVar

import torch.distributed as dist

from attnres_train.parallel.ranks import Ranks

T = TypeVar("T")


def hand_over(value: T | None, ranks: Ranks) -> tuple[T, dict[str, T]]:
    """``value`` of the process of this machine that has one, and those of all machines by name, of
    rank 0's first. Nothing is written: machines need no file system in common. Collective.

    A machine is known by its host name, which nobody needs to resolve; of several machines of one
    name, each takes the value of the nearest rank before its own.
    """
    told: list[tuple[str, T | None]] = [("", None)] * ranks.world_size
    dist.all_gather_object(told, (socket.gethostname(), value), group=ranks.control)
    return choose(told, ranks.rank), by_machine(told)


def choose(told: list[tuple[str, T | None]], rank: int) -> T:
    """Of the (machine, value) that each rank has told, the value for ``rank``."""
    here = told[rank][0]
    given = [(other, name, value) for other, (name, value) in enumerate(told) if value is not None]
    # On this machine before others, not after this rank before after it, then nearest.
    *_, (_, _, chosen) = sorted(
        given, key=lambda one: (one[1] == here, one[0] <= rank, -abs(one[0] - rank))
    )
    return chosen


def by_machine(told: list[tuple[str, T | None]]) -> dict[str, T]:
    """Machine -> value; one that shares its name with another is named with its rank too."""
    values: dict[str, T] = {}
    for rank, (name, value) in enumerate(told):
        if value is not None:
            values[f"{name} (rank {rank})" if name in values else name] = value
    return values
