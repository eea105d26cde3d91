"""Which rank made a run stop, from what the others have waited for.

A rank that hangs in a computation cannot tell. But its neighbours wait for it, others for them, and
the chain of who waits for whom ends at the rank that waits for nobody. All rank numbers are global.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from attnres_train.pipeline.run.waits import Wait


@dataclass(frozen=True)
class Failure:
    """How one rank failed."""

    rank: int
    time: float
    """Seconds since the epoch."""
    error: str
    waiting: Wait | None = None
    """The tensor that it waited for in vain."""
    pending: list[Wait] = field(default_factory=list)
    """Whatever else was on its way from or to it."""
    ended: bool = False
    """Whether it was ended where it was, while it had not failed itself."""
    stuck_since: float | None = None
    """When its last pass began, where it got on no more, seconds since the epoch."""
    traceback: str = ""
    """Of its error."""

    @property
    def timed_out(self) -> bool:
        """Whether its peers were silent, rather than gone."""
        return "timed out" in self.error.lower()


def explain(failures: Sequence[Failure], world_size: int) -> str | None:
    """Why a run of ``world_size`` ranks stopped, with the rank to blame; None where the first
    failure was another than that peers were silent."""
    own = [failure for failure in failures if not failure.ended]
    first = min(own, key=lambda failure: failure.time, default=None)
    stuck = {f.rank: f.stuck_since for f in own if f.stuck_since}
    if first and first.rank in stuck:  # its process group has not told: who stopped first?
        rank = min(stuck, key=lambda rank: stuck[rank])
        return f"rank {rank} stopped the run" + _own_words(failures, {rank})
    if first is None or not first.timed_out:
        return None
    # Who began to wait later was at work when the first gave up, or woke up after that.
    waits = {f.rank: f.waiting for f in failures if f.waiting and f.waiting.since <= first.time}
    if not waits:
        silent = set(range(world_size)) - {f.rank for f in failures if f.timed_out}
        told = f"{_ranks(silent)} did not join an operation of all ranks, e.g. the gradient norm"
        return told + _own_words(failures, silent) if silent else None
    start = min(waits, key=lambda rank: waits[rank].since)
    *before, end = chain({rank: wait.peer for rank, wait in waits.items()}, start)
    if end in before:
        return _told_of_circle(waits, before[before.index(end) :])
    return _told_of_chain(waits, end) + _own_words(failures, {end})


def chain(waits_for: Mapping[int, int], start: int) -> list[int]:
    """``start``, the rank that it waits for, the one that this waits for, and so on: up to a rank
    that waits for none, or to one that is in the chain already."""
    ranks = [start]
    while ranks[-1] in waits_for and ranks[-1] not in ranks[:-1]:
        ranks.append(waits_for[ranks[-1]])
    return ranks


def _told_of_circle(waits: Mapping[int, Wait], circle: Sequence[int]) -> str:
    told = "; ".join(f"rank {rank} for {waits[rank]}" for rank in circle)
    return f"{_ranks(circle)} waited for each other, a tensor was lost on the way: {told}"


def _told_of_chain(waits: Mapping[int, Wait], end: int) -> str:
    direct = {rank: wait for rank, wait in waits.items() if wait.peer == end}
    told = f"rank {end} stopped the run: " + "; ".join(
        f"rank {rank} waited since {_clock(wait.since)} for {wait}" for rank, wait in direct.items()
    )
    others = waits.keys() - direct
    return told + f"; {_ranks(others)} waited in turn" if others else told


def _own_words(failures: Sequence[Failure], ranks: set[int]) -> str:
    """What the ranks to blame have written down themselves, if anything."""
    return "".join(f"\nrank {f.rank}: {f.error}" for f in failures if f.rank in ranks)


def _ranks(ranks: Iterable[int]) -> str:
    numbers = sorted(ranks)
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def _clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%H:%M:%S UTC")
