"""Discrete-event simulation of a training step: passes, and the transfers between ranks.

Each rank computes one pass at a time and owns one port, through which everything that it sends
leaves tensor by tensor at the link's bandwidth while it computes on. Tensors that a receiver waits
for go ahead of history that it needs later.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Literal, NamedTuple

from attnres_train.pipeline.plan import Hop, TransportPlan
from attnres_train.pipeline.port import Message, Port, Transfer
from attnres_train.pipeline.schedule import Action, Schedule

Mode = Literal["standard", "naive", "padded", "exact", "eager"]
"""What a hop carries, as in `plan.Units`; ``eager`` is the exact payload with what the sender held
before leaving ahead of its forward pass, and its gradients due only behind the receiver's."""
MODES: tuple[Mode, ...] = ("standard", "naive", "padded", "exact", "eager")


class Payload(NamedTuple):
    """Units of one hop, micro-batch and direction."""

    urgent: int
    """Sent behind the pass, waited for before the next."""
    relaxed: int
    """Forward: sent ahead of the pass. Backward: due behind the receiver's pass."""


class Pass(NamedTuple):
    """A pass on the timeline, in seconds from the start of the step."""

    rank: int
    action: Action
    start: float
    compute_end: float
    end: float
    """Later than ``compute_end`` where gradients that are due behind the pass come late."""


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


def payloads(plan: TransportPlan, mode: Mode) -> list[Payload]:
    """Per hop, what crosses it under ``mode``."""
    widest = max((hop.units for hop in plan.hops), default=0)

    def payload(hop: Hop) -> Payload:
        if hop.is_local:
            return Payload(0, 0)
        if mode == "eager":
            return Payload(len(hop.fresh) + hop.partial, len(hop.held))
        history = len(plan.reads(hop.dst_chunk)) + hop.partial
        units = {"standard": 1, "naive": history, "padded": widest, "exact": hop.units}
        return Payload(units[mode], 0)

    return [payload(hop) for hop in plan.hops]


def simulate(
    plan: TransportPlan, schedule: Schedule, costs: Costs, mode: Mode, *, record: bool = True
) -> Timeline:
    """The timeline of one step of ``schedule``, which `validate` must have accepted."""
    return _Simulation(plan, schedule, costs, payloads(plan, mode), record).run()


class _Simulation:
    def __init__(
        self,
        plan: TransportPlan,
        schedule: Schedule,
        costs: Costs,
        hops: list[Payload],
        record: bool,
    ) -> None:
        self.schedule, self.costs, self.record = schedule, costs, record
        self.rank_of = [plan.layout.rank_of(chunk) for chunk in range(plan.layout.num_chunks)]
        # By chunk, what its pass takes in and what it sends; nothing at the ends of the model.
        nothing = Payload(0, 0)
        before, after = [nothing, *hops], [*hops, nothing]
        self.incoming = {"F": before, "B": after}
        self.outgoing = {"F": after, "B": before}
        self.timeline = Timeline([0.0] * len(schedule))
        self.events: list[tuple[float, int, Callable[[float], None]]] = []
        self.sequence = count()  # events of one time run in the order they were made
        self.position = [0] * len(schedule)
        self.running: list[Pass | None] = [None] * len(schedule)
        self.ports = [
            Port(rank, costs.unit, self.at, self._delivered) for rank in range(len(schedule))
        ]
        # Units that have arrived for each pass.
        self.urgent: dict[Action, int] = {}
        self.relaxed: dict[Action, int] = {}

    def at(self, time: float, event: Callable[[float], None]) -> None:
        heapq.heappush(self.events, (time, next(self.sequence), event))

    def run(self) -> Timeline:
        for rank in range(len(self.schedule)):
            self._start(rank, 0.0)
        while self.events:
            self.timeline.seconds, _, event = heapq.heappop(self.events)
            event(self.timeline.seconds)
        return self.timeline

    def _start(self, rank: int, now: float) -> None:
        """Start the rank's next pass if it is free and everything for it has arrived."""
        if self.running[rank] or self.position[rank] == len(self.schedule[rank]):
            return
        action = self.schedule[rank][self.position[rank]]
        forward = action.kind == "F"
        if not self._has_urgent(action) or (forward and not self._has_relaxed(action)):
            return
        seconds = (self.costs.forward if forward else self.costs.backward)[action.chunk]
        self.running[rank] = Pass(rank, action, now, now + seconds, now + seconds)
        self.timeline.compute_seconds[rank] += seconds
        if forward:
            self._send_relaxed(rank, action, now)
        self.at(now + seconds, partial(self._finish, rank))

    def _has_urgent(self, action: Action) -> bool:
        """Between chunks of one rank nothing is sent, but the pass before still has to be over:
        its end counts as the arrival of nothing."""
        kind, chunk, _ = action
        first = chunk == (0 if kind == "F" else len(self.rank_of) - 1)
        return first or self.urgent.get(action) == self.incoming[kind][chunk].urgent

    def _has_relaxed(self, action: Action) -> bool:
        needed = self.incoming[action.kind][action.chunk].relaxed
        return not needed or self.relaxed.get(action) == needed

    def _finish(self, rank: int, now: float) -> None:
        """End the rank's pass, unless gradients that are due behind it are still on their way."""
        one = self.running[rank]
        if one is None or now < one.compute_end:
            return
        action = one.action
        backward = action.kind == "B"
        if backward and not self._has_relaxed(action):
            return
        self.running[rank] = None
        self.position[rank] += 1
        if self.record:
            self.timeline.passes.append(one._replace(end=now))
        self._send_urgent(rank, action, now)
        if backward:
            self._send_relaxed(rank, action, now)
        self._start(rank, now)

    def _send_urgent(self, rank: int, action: Action, now: float) -> None:
        enabled = self._next_pass(action)
        if enabled is None:
            return
        units = self.outgoing[action.kind][action.chunk].urgent
        if units:
            self.ports[rank].send(Message(self.rank_of[enabled.chunk], enabled, True, units), now)
        else:
            self._arrive(enabled, True, 0, now)

    def _send_relaxed(self, rank: int, action: Action, now: float) -> None:
        units = self.outgoing[action.kind][action.chunk].relaxed
        enabled = self._next_pass(action)
        if units and enabled:
            self.ports[rank].send(Message(self.rank_of[enabled.chunk], enabled, False, units), now)

    def _next_pass(self, action: Action) -> Action | None:
        kind, chunk, micro_batch = action
        chunk += 1 if kind == "F" else -1
        return Action(kind, chunk, micro_batch) if 0 <= chunk < len(self.rank_of) else None

    def _delivered(self, transfer: Transfer) -> None:
        if self.record:
            self.timeline.transfers.append(transfer)
        self._arrive(transfer.enables, transfer.urgent, transfer.units, transfer.end)

    def _arrive(self, action: Action, urgent: bool, units: int, now: float) -> None:
        arrived = self.urgent if urgent else self.relaxed
        arrived[action] = arrived.get(action, 0) + units
        rank = self.rank_of[action.chunk]
        if self.running[rank]:
            self._finish(rank, now)
        else:
            self._start(rank, now)
