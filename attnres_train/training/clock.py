"""Where the time of a step goes, by the host's clock."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from attnres_train.training.totals import StepTotals


class StepClock:
    """Seconds of one step so far, on this process, by what they went to.

    Nothing is synchronised. On a CPU that is the work itself. A GPU works behind the host: there
    these are the times that the host spends, what the device still has to do is waited for where a
    number is read from it first (``reduce``: loss and gradient norm), and waits for peers are in
    the device's queue, not here.
    """

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.data = self.passes = self.waited = self.reduce = self.optimizer = 0.0

    @contextmanager
    def on(self, part: str) -> Iterator[None]:
        """Count the time of the context as ``part``'s: `data`, `passes`, `reduce`, `optimizer`."""
        started = time.perf_counter()
        yield
        setattr(self, part, getattr(self, part) + time.perf_counter() - started)

    @property
    def seconds(self) -> float:
        """Since the step began."""
        return time.perf_counter() - self.started

    def spent(self) -> Spent:
        return Spent(self.data, self.passes, self.waited, self.reduce, self.seconds)


class Spent(NamedTuple):
    """Seconds of a rank before its update: `data` made and taken to the device, `passes` from the
    first forward to the last backward one, of which `waited` for what peers send or take, `reduce`
    for sums over ranks that passes had not hidden, from the last gradient on, and `so_far` all."""

    data: float
    passes: float
    waited: float
    reduce: float
    so_far: float


def shares(totals: StepTotals, clock: StepClock, rank: int, pipeline: int) -> dict[str, float]:
    """What is logged of where a step's time went: shares of it, the mean over ranks (of the update
    this rank's, which owns about as much as any). With a ``pipeline`` of several ranks also
    ``bubble``: the share of their time in which ranks are not in a pass, until the last of them
    has done all of its own."""
    means = Spent(*(sum(of_ranks) / len(of_ranks) for of_ranks in totals.spent))
    of_this_rank = totals.spent[-1][rank]
    # Ranks begin a step one after the other, but all have the totals at the same time.
    seconds = means.so_far + clock.seconds - of_this_rank
    found = {
        "data_share": means.data,
        "compute_share": means.passes - means.waited,
        "wait_share": means.waited,
        "reduce_share": means.reduce,
        "optimizer_share": clock.optimizer,
    }
    record = {name: value / seconds for name, value in found.items()}
    longest = max(totals.spent[1])
    if pipeline > 1 and longest:
        record["bubble"] = 1 - (means.passes - means.waited) / longest
    return record
