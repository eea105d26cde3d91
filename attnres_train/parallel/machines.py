"""The machines of a run, as its processes have named them. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Place(NamedTuple):
    """Where a rank runs. A machine is known by its host name, which nobody needs to resolve."""

    machine: str
    local_rank: int


def first_ranks(places: Sequence[Place]) -> list[int]:
    """For each rank, the first one of its machine; of several machines of one name, the nearest
    before it."""
    told = [(name, rank if local == 0 else None) for rank, (name, local) in enumerate(places)]
    if not any(first is not None for _, first in told):  # nobody has said so: rank 0 it is
        return [0] * len(places)
    return [choose(told, rank) for rank in range(len(told))]


def choose(told: Sequence[tuple[str, T | None]], rank: int) -> T:
    """Of the (machine, value) that each rank has told, the value for ``rank``."""
    here = told[rank][0]
    given = [(other, name, value) for other, (name, value) in enumerate(told) if value is not None]
    # On this machine before others, not after this rank before after it, then nearest.
    *_, (_, _, chosen) = sorted(
        given, key=lambda one: (one[1] == here, one[0] <= rank, -abs(one[0] - rank))
    )
    return chosen


def machine_names(places: Sequence[Place]) -> list[str]:
    """For each rank, its machine's name; a machine that shares it with an earlier one is named with
    its first rank too."""
    firsts = first_ranks(places)
    known: dict[str, int] = {}
    for first in dict.fromkeys(firsts):
        known.setdefault(places[first].machine, first)
    names = [places[first].machine for first in firsts]
    return [
        name if known[name] == first else f"{name} (rank {first})"
        for first, name in zip(firsts, names, strict=True)
    ]
