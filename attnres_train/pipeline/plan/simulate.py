"""Discrete-event simulation of a training step: passes, and the transfers between ranks.

Each rank computes one pass at a time. What it sends leaves while it computes on, in the order of
sending, through one port of limited bandwidth, or through one for each neighbour.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

from attnres_train.pipeline.plan.parts import Mode, Part, parts
from attnres_train.pipeline.plan.schedule import Action, Schedule
from attnres_train.pipeline.plan.transport_plan import TransportPlan


class Transfer(NamedTuple):
    """A part on the wire, for the pass ``enables``; times in seconds."""

    src: int
    dst: int
    enables: Action
    part: Part
    start: float
    end: float


class Pass(NamedTuple):
    """A pass on the timeline, in seconds from the start of the step."""

    rank: int
    action: Action
    start: float
    compute_end: float
    end: float
    """Later than ``compute_end`` where gradients that are due within the pass come late."""


@dataclass(frozen=True)
class Costs:
    """Seconds per micro-batch of each chunk's passes, and of one unit on a link."""

    forward: Sequence[float]
    backward: Sequence[float]
    unit: float


@dataclass
class Timeline:
    """A simulated step. ``passes`` and ``transfers``, in order of their ends, if recorded."""

    compute_seconds: list[float]
    """Per rank, the time spent in passes."""
    seconds: float = 0.0
    passes: list[Pass] = field(default_factory=list)
    transfers: list[Transfer] = field(default_factory=list)

    @property
    def bubble(self) -> float:
        """Share of the ranks' time in which they do not compute."""
        return 1 - sum(self.compute_seconds) / (len(self.compute_seconds) * self.seconds)


def simulate(
    plan: TransportPlan,
    schedule: Schedule,
    costs: Costs,
    mode: Mode,
    *,
    record: bool = True,
    port_per_neighbour: bool = False,
) -> Timeline:
    """The timeline of one step of ``schedule``, which `validate` must have accepted. A rank has one
    port for all that it sends or, with ``port_per_neighbour``, one for each rank it sends to."""
    return _Simulation(plan, schedule, costs, parts(plan, mode), record, port_per_neighbour).run()


_Arrival = tuple[Action, Part]  # of a part for a pass
_Wish = float | _Arrival  # of a rank: the time to sleep until, or what it waits for


class _Simulation:
    """Ranks are generators: each yields what it wishes for and goes on when that has come true."""

    def __init__(
        self,
        plan: TransportPlan,
        schedule: Schedule,
        costs: Costs,
        hops: list[tuple[Part, ...]],
        record: bool,
        port_per_neighbour: bool,
    ) -> None:
        self.schedule, self.costs, self.record = schedule, costs, record
        self.port_per_neighbour = port_per_neighbour
        self.rank_of = [plan.layout.rank_of(chunk) for chunk in range(plan.layout.num_chunks)]
        self.before, self.after = [(), *hops], [*hops, ()]  # what crosses next to each chunk
        self.timeline = Timeline([0.0] * len(schedule))
        self.now = 0.0
        self.sequence = count()  # events of one time run in the order they were made
        self.events: list[tuple[float, int, int, Transfer | None]] = []
        self.ranks = [self._run_rank(rank) for rank in range(len(schedule))]
        self.port_free: dict[tuple[int, int], float] = {}
        self.arrived: set[_Arrival] = set()
        self.waiting: dict[_Arrival, int] = {}

    def run(self) -> Timeline:
        for rank in range(len(self.ranks)):
            self._resume(rank)
        while self.events:
            self.now, _, rank, transfer = heapq.heappop(self.events)
            if transfer is not None:
                self._arrive(transfer)
            else:
                self._resume(rank)
        self.timeline.seconds = self.now
        return self.timeline

    def _resume(self, rank: int) -> None:
        """Let the rank go on to where it sleeps or waits for something that is not there."""
        for wish in self.ranks[rank]:  # a generator: the loop goes on where it was left
            if isinstance(wish, float):
                if wish > self.now:
                    heapq.heappush(self.events, (wish, next(self.sequence), rank, None))
                    return
            elif wish not in self.arrived:
                self.waiting[wish] = rank
                return

    def _arrive(self, transfer: Transfer) -> None:
        if self.record:
            self.timeline.transfers.append(transfer)
        arrival = transfer.enables, transfer.part
        self.arrived.add(arrival)
        if arrival in self.waiting:
            self._resume(self.waiting.pop(arrival))

    def _run_rank(self, rank: int) -> Iterator[_Wish]:
        for action in self.schedule[rank]:
            forward = action.kind == "F"
            seconds = (self.costs.forward if forward else self.costs.backward)[action.chunk]
            if forward:
                start = yield from self._forward(action, seconds)
            else:
                start = yield from self._backward(action, seconds)
            self.timeline.compute_seconds[rank] += seconds
            if self.record:
                self.timeline.passes.append(Pass(rank, action, start, start + seconds, self.now))

    def _forward(self, action: Action, seconds: float) -> Generator[_Wish, None, float]:
        """Returns when the pass started, after the passing on of what it reads."""
        coming, leaving = deque(self.before[action.chunk]), self.after[action.chunk]
        enables = action._replace(chunk=action.chunk + 1)
        held = [part for part in leaving if not part.share]
        for part in held:  # as `program` has it: sent on as soon as it has come
            while coming and coming[0].blocks and coming[0].blocks[0] <= part.blocks[-1]:
                yield action, coming.popleft()
            self._send(action, enables, part)
        for part in coming:
            yield action, part
        start = self.now
        for part in leaving[len(held) :]:
            yield start + part.share * seconds
            self._send(action, enables, part)
        yield start + seconds
        return start

    def _backward(self, action: Action, seconds: float) -> Generator[_Wish, None, float]:
        """Returns when the pass started, after the gradients that it starts from."""
        # The pass runs from where the forward one ended (share 1) to where it began (share 0). A
        # gradient is due where its tensor was made, that of one held before (late) after the pass.
        coming = self.after[action.chunk][::-1]
        late = deque(part for part in coming if not part.share)
        start, left = None, 1.0
        for part in coming[: len(coming) - len(late)]:
            if start is None and part.share < 1:  # all that it starts from has come
                start = self.now
            yield self.now + (left - part.share) * seconds
            yield action, part
            left = part.share
        start = self.now if start is None else start
        yield self.now + left * seconds
        enables = action._replace(chunk=action.chunk - 1)
        for part in reversed(self.before[action.chunk]):
            while late and part.blocks and late[0].blocks[-1] >= part.blocks[0]:
                yield action, late.popleft()
            self._send(action, enables, part)
        for part in late:
            yield action, part
        return start

    def _send(self, action: Action, enables: Action, part: Part) -> None:
        src, dst = self.rank_of[action.chunk], self.rank_of[enables.chunk]
        port = src, dst if self.port_per_neighbour else -1
        start = max(self.now, self.port_free.get(port, 0.0))
        end = self.port_free[port] = start + part.units * self.costs.unit
        transfer = Transfer(src, dst, enables, part, start, end)
        heapq.heappush(self.events, (end, next(self.sequence), dst, transfer))
