"""What no order of sending can beat: a lower bound for a step on links of limited bandwidth.

Given are the plan and the schedule: which tensor crosses which link, and the order of each rank's
passes. Passes and transfers are the nodes of a graph, whose edges say how long after the start of
one the other can start at the earliest. The longest path to a transfer is its *head*, the longest
path after it its *tail*. A link carries one transfer at a time, so for any set of its transfers

    step >= least head + seconds of all of them in a row + least tail

(J. Carlier, The one-machine sequencing problem, 1982). The bound is the largest such value, over
all links and sets. In the head of a saturated link is how the pipeline fills, in the tail how the
last micro-batch goes to the end of the pipeline and its gradients come back. Both are raised by the
same argument: a rank goes on no sooner than all that it has waited for can have crossed its link.
"""

from __future__ import annotations

from bisect import insort
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, NamedTuple

from attnres_train.pipeline.plan.parts import ready_share
from attnres_train.pipeline.plan.schedule import Action, Schedule
from attnres_train.pipeline.plan.simulate import Costs
from attnres_train.pipeline.plan.transport_plan import Hop, TransportPlan


class Event(NamedTuple):
    """The start or the end of a pass."""

    action: Action
    what: Literal["start", "end"]


class Unit(NamedTuple):
    """The transfer of a block, or the partial (None), or its gradient, for the pass ``enables``."""

    enables: Action
    block: int | None


Node = Event | Unit


@dataclass
class Graph:
    """Nodes and the links of the transfers among them, (from rank, to rank)."""

    after: dict[Node, dict[Node, float]] = field(default_factory=lambda: defaultdict(dict))
    """``after[a][b]``: b starts at least so many seconds after the start of a."""
    link_of: dict[Unit, tuple[int, int]] = field(default_factory=dict)

    def edge(self, first: Node, then: Node, seconds: float) -> None:
        self.after[first][then] = seconds
        self.after[then]  # every node is a key

    def reversed(self, unit: float) -> Graph:
        """Time runs backward, from the ends of the transfers, each of ``unit`` seconds."""
        graph = Graph(link_of=self.link_of)
        for first, others in self.after.items():
            for then, seconds in others.items():
                lag = seconds + unit * (isinstance(then, Unit) - isinstance(first, Unit))
                graph.edge(then, first, lag)
        return graph

    def heads(self, unit: float) -> dict[Node, float]:
        """The least start of every node."""
        before: dict[Node, list[tuple[Node, float]]] = {node: [] for node in self.after}
        for first, others in self.after.items():
            for then, seconds in others.items():
                before[then].append((first, seconds))
        heads: dict[Node, float] = {}
        crossed: dict[tuple[int, int], list[float]] = defaultdict(list)
        """By link, heads of the transfers that its rank has waited for so far."""
        for node in self._in_order(before):
            heads[node] = max((heads[first] + lag for first, lag in before[node]), default=0.0)
            if isinstance(node, Event):
                awaited = [first for first, _ in before[node] if isinstance(first, Unit)]
                for transfer in awaited:
                    insort(crossed[self.link_of[transfer]], heads[transfer])
                for link in {self.link_of[transfer] for transfer in awaited}:
                    heads[node] = max(heads[node], in_a_row(crossed[link], unit))
        return heads

    def _in_order(self, before: dict[Node, list]) -> Iterator[Node]:
        """Every node, after all those before it."""
        missing = {node: len(first) for node, first in before.items()}
        ready = [node for node, count in missing.items() if not count]
        while ready:
            yield (node := ready.pop())
            for then in self.after[node]:
                missing[then] -= 1
                if not missing[then]:
                    ready.append(then)


def in_a_row(heads: Sequence[float], unit: float) -> float:
    """When transfers with these heads (ascending) can all have crossed their one link."""
    count = len(heads)
    return max(head + unit * (count - index) for index, head in enumerate(heads))


def step_bound(plan: TransportPlan, schedule: Schedule, costs: Costs) -> float:
    """Seconds that a training step takes at least, with a full-duplex link between neighbours.
    ``schedule`` must fit ``plan`` (see `pipeline.plan.validate`)."""
    graph = _graph(plan, schedule, costs)
    heads, tails = graph.heads(costs.unit), graph.reversed(costs.unit).heads(costs.unit)
    bound = max(heads.values())
    by_link = defaultdict(list)
    for transfer, link in graph.link_of.items():
        by_link[link].append((heads[transfer], tails[transfer]))
    for transfers in by_link.values():
        tails_so_far: list[float] = []
        for head, tail in sorted(transfers, reverse=True):
            insort(tails_so_far, tail)
            # The sets worth trying: all from this head on with one of their tails or a longer one.
            bound = max(bound, head + in_a_row(tails_so_far, costs.unit))
    return bound


def _graph(plan: TransportPlan, schedule: Schedule, costs: Costs) -> Graph:
    graph = Graph()
    for actions in schedule:
        for action in actions:
            seconds = (costs.forward if action.kind == "F" else costs.backward)[action.chunk]
            graph.edge(Event(action, "start"), Event(action, "end"), seconds)
        for action, then in pairwise(actions):
            graph.edge(Event(action, "end"), Event(then, "start"), 0.0)
    journeys = list(_journeys(plan))
    for micro_batch in {action.micro_batch for action in schedule[0]}:
        for journey in journeys:
            _forward(graph, costs, micro_batch, journey)
            _backward(graph, costs, micro_batch, journey)
    return graph


class _Journey(NamedTuple):
    """The hops that a block, or the partial (None), takes one after another."""

    block: int | None
    hops: list[Hop]
    share: float
    """Of the forward pass that makes it, after which it is ready."""


def _journeys(plan: TransportPlan) -> Iterator[_Journey]:
    wire = [hop for hop in plan.hops if not hop.is_local]
    for block in range(plan.layout.blocks.num_blocks):
        if hops := [hop for hop in wire if block in hop.blocks]:
            yield _Journey(block, hops, ready_share(plan, hops[0].src_chunk, block))
    for hop in wire:
        if hop.partial:
            yield _Journey(None, [hop], ready_share(plan, hop.src_chunk, None))


def _forward(graph: Graph, costs: Costs, micro_batch: int, journey: _Journey) -> None:
    source = journey.hops[0].src_chunk
    before = Event(Action("F", source, micro_batch), "start")
    seconds = journey.share * costs.forward[source]
    for hop in journey.hops:
        reader = Action("F", hop.dst_chunk, micro_batch)
        unit = Unit(reader, journey.block)
        graph.link_of[unit] = hop.src_rank, hop.dst_rank
        graph.edge(before, unit, seconds)
        graph.edge(unit, Event(reader, "start"), costs.unit)
        before, seconds = unit, costs.unit


def _backward(graph: Graph, costs: Costs, micro_batch: int, journey: _Journey) -> None:
    """The gradient travels back, on each rank joined by that of the readers there."""
    before = None
    for hop in reversed(journey.hops):
        unit = Unit(Action("B", hop.src_chunk, micro_batch), journey.block)
        graph.link_of[unit] = hop.dst_rank, hop.src_rank
        graph.edge(Event(Action("B", hop.dst_chunk, micro_batch), "end"), unit, 0.0)
        if before:
            graph.edge(before, unit, costs.unit)
        before = unit
    # Waited for where the pass comes to where the block was made; the rest of the pass follows it.
    maker = before.enables
    left = journey.share * costs.backward[maker.chunk]
    if journey.share < 1:
        graph.edge(before, Event(maker, "end"), costs.unit + left)
    else:
        graph.edge(before, Event(maker, "start"), costs.unit)
