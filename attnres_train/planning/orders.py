"""The order of a pipeline's passes, of as many micro-batches as fill it, and what it holds.

Shapes: P pipeline ranks, V virtual stages, C = P V chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from attnres_train.config.kinds import kind_of
from attnres_train.config.schema import RunConfig
from attnres_train.pipeline.plan.layout import Layout
from attnres_train.pipeline.plan.schedule import Action, Schedule
from attnres_train.pipeline.plan.transport_plan import TransportPlan
from attnres_train.pipeline.plan.validate import Report, validate


class Shape(NamedTuple):
    """What a pipeline's order depends on."""

    pipeline: int
    virtual: int
    bounds: tuple[int, ...]
    """Of chunks, in layers."""
    micro_batches: int

    def dealt(self, of_chunks: np.ndarray) -> np.ndarray:
        """[C] -> [P, V]."""
        return of_chunks.reshape(self.virtual, self.pipeline).T


@dataclass(frozen=True)
class Order:
    """A schedule of as many micro-batches as fill the pipeline, and what it holds at a time."""

    plan: TransportPlan
    schedule: Schedule
    stored: Report
    alive: np.ndarray
    """[P, n, V] micro-batches whose backward pass is to come, by chunk, whenever there are most."""

    @cached_property
    def stored_units(self) -> np.ndarray:
        """[P] blocks and partials that a rank stores at most."""
        return np.array(self.stored.peak_blocks) + np.array(self.stored.peak_partials)

    @cached_property
    def widest_hop(self) -> int:
        """Units."""
        return max((hop.units for hop in self.plan.hops), default=0)

    @cached_property
    def most_sent(self) -> int:
        """Units that the rank with most to send sends per micro-batch: forward, and gradients."""
        sent = [0] * self.plan.layout.num_ranks
        for hop in self.plan.hops:
            sent[hop.src_rank] += hop.units
            sent[hop.dst_rank] += hop.units
        return max(sent)


def make_order(config: RunConfig, shape: Shape) -> Order:
    """By the schedule of ``config``. Raises UserError where that cannot be run."""
    model, kind = config.model, kind_of(config, "pipeline.schedule")
    plan = TransportPlan(Layout(model.residual_kind.plan, shape.bounds, shape.pipeline))
    with kind.faults_named():
        schedule = kind.schedule(shape.pipeline, shape.virtual, shape.micro_batches)
        stored = validate(plan, schedule)
    alive = [list(_most_alive(actions, shape)) for actions in schedule]
    rows = max(map(len, alive))
    padded = [[*of, *([of[0]] * (rows - len(of)))] for of in alive]
    return Order(plan, schedule, stored, np.array(padded, dtype=float))


def extrapolated(seconds: Callable[[int], float], count: int, ranks: int) -> float:
    """Of ``count`` micro-batches on ``ranks`` stages, where ``seconds`` simulates any number: of
    many those that fill the pipeline are simulated, the rest take as long as the last of them."""
    few, more = min(count, 3 * ranks), min(count, 4 * ranks)
    last = seconds(more)
    return last if more == count else last + (count - more) * (last - seconds(few)) / (more - few)


def _most_alive(actions: Sequence[Action], shape: Shape) -> Iterator[tuple[int, ...]]:
    """The counts, by virtual stage, of a rank's micro-batches in flight that no others exceed."""
    count = [0] * shape.virtual
    seen = set()
    for kind, chunk, _ in actions:
        count[chunk // shape.pipeline] += 1 if kind == "F" else -1
        if kind == "F":
            seen.add(tuple(count))
    for one in sorted(seen):
        if not any(other != one and all(map(int.__le__, one, other)) for other in seen):
            yield one
