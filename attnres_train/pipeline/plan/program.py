"""Programs: what a rank does in one pass of a schedule, down to the single message.

Pure Python, from plan and schedule alone. The engine does what a program says and nothing else, so
that whatever is proved of programs (see `in_order`) holds for what runs.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass

from attnres_train.pipeline.plan.messages import Channel, Message, arriving, leaving
from attnres_train.pipeline.plan.schedule import Action, Schedule
from attnres_train.pipeline.plan.transport_plan import TransportPlan
from attnres_train.pipeline.plan.validate import Report, validate

LOOK_AHEAD = 2
"""Receives are posted this many actions ahead: in the steady state, for the next F and next B. Each
has a buffer, and more of them made no step faster (docs/benchmarks.md)."""


@dataclass(frozen=True)
class Step:
    """One action of a rank and its messages, in the order in which the rank comes to them.

    A message that the rank receives is waited for at its place, one that it sends starts there.
    """

    action: Action
    slot: int
    """See `start_slots`."""
    posted: tuple[Message, ...]
    """Receives that are posted ahead of everything else, for this action and the next ones."""
    before: tuple[Message, ...]
    """Ahead of the pass: what it needs to start and, forward, what is only passed on."""
    inside: tuple[Message, ...]
    """Forward: blocks that the chunk makes, sent as they are complete. Backward: the gradients of
    blocks that the chunk also reads itself, waited for where the pass comes to them."""
    after: tuple[Message, ...]
    """After the pass."""


class Program:
    """What ``rank`` does in one pass of ``schedule``; made once per number of micro-batches.

    Raises ScheduleError if plan and schedule do not fit together (see `validate`).
    """

    def __init__(self, plan: TransportPlan, schedule: Schedule, rank: int) -> None:
        self.report: Report = validate(plan, schedule)
        self.rank, self.training = rank, any(action.kind == "B" for action in schedule[rank])
        self.last_backward = {a.chunk: a for a in schedule[rank] if a.kind == "B"}
        """By chunk, the pass after which its parameters' gradients are whole."""
        self._num_ranks = plan.layout.num_ranks
        self._slots = start_slots(schedule, plan.layout.num_chunks)
        self.steps = [
            Step(action, self._slots[action], posted, *_places(plan, action))
            for action, posted in zip(schedule[rank], _posted(plan, schedule, rank), strict=True)
        ]

    def sends(self, message: Message) -> bool:
        """Whether this rank sends ``message``, rather than receives it."""
        return message.channel.src_rank == self.rank

    def due(self, message: Message) -> int:
        """The slot after which a message sent by this rank is waited for, if it is not known to
        have gone before: P slots after its receipt, for passes do not all take one slot."""
        return self._slots[message.action] + self._num_ranks


def _places(plan: TransportPlan, action: Action) -> tuple[tuple[Message, ...], ...]:
    """The messages before, inside and after the pass of ``action``."""
    return (_around_forward if action.kind == "F" else _around_backward)(plan, action)


def _around_forward(plan: TransportPlan, action: Action) -> tuple[tuple[Message, ...], ...]:
    """What the next rank lacks of the history leaves as soon as it is here."""
    coming, before = deque(arriving(plan, action)), []
    blocks = [message for message in leaving(plan, action) if message.block is not None]
    partial = [message for message in leaving(plan, action) if message.block is None]
    for message in (message for message in blocks if message.is_held):
        # Some of these are still on their way here. Blocks come in ascending order, the partial
        # last, so that the wait for one that is passed on ends with its own arrival.
        while coming and coming[0].block is not None and coming[0].key <= message.key:
            before.append(coming.popleft())
        before.append(message)
    fresh = [message for message in blocks if not message.is_held]
    return (*before, *coming), tuple(fresh), tuple(partial)


def _around_backward(plan: TransportPlan, action: Action) -> tuple[tuple[Message, ...], ...]:
    """The gradient of a held block is due only when it is to be returned itself, or released."""
    coming, used_inside = arriving(plan, action), plan.used_inside(action.chunk)
    fresh = [message for message in coming if not message.is_held]
    inside = [message for message in fresh if message.block in used_inside]
    # The pass starts from these: the partial, and blocks that the chunk makes but does not read.
    before = [message for message in fresh if message not in inside]
    late = {message.block: message for message in coming if message.is_held}
    after: list[Message] = []
    for message in leaving(plan, action):
        # Nothing waits for what it does not need: what comes back for a block is added right before
        # its gradient leaves, and last what comes back for blocks that stay on this rank.
        if message.block in late:
            after.append(late.pop(message.block))
        after.append(message)
    return tuple(before), tuple(inside), (*after, *late.values())


def _posted(plan: TransportPlan, schedule: Schedule, rank: int) -> Iterator[tuple[Message, ...]]:
    """For each action of ``rank``, the receives that become due to be posted: those for it and the
    `LOOK_AHEAD` next ones, each after all that its peer sends before it on its channel."""
    # A set: of two ranks, both neighbours are the same one.
    actions, neighbours = schedule[rank], {(rank + step) % len(schedule) for step in (-1, 1)}
    sent: defaultdict[Channel, deque[Message]] = defaultdict(deque)
    for action in (action for neighbour in neighbours for action in schedule[neighbour]):
        for message in leaving(plan, action):
            if message.channel.dst_rank == rank:
                sent[message.channel].append(message)
    done: set[Message] = set()
    for index in range(len(actions)):
        posted = []
        for action in actions[index : index + 1 + LOOK_AHEAD]:
            for message in arriving(plan, action):
                # A schedule may order the peer's passes otherwise. The n-th receive on a channel
                # gets its n-th tensor, so what is sent before this one is posted before it.
                while message not in done:
                    posted.append(sent[message.channel].popleft())
                    done.add(posted[-1])
        yield tuple(posted)


def start_slots(schedule: Schedule, num_chunks: int) -> dict[Action, int]:
    """When each action of a valid ``schedule`` starts, if each takes one slot and messages none.

    An action's slot is above those of everything it depends on, so any rule that makes actions
    wait only for lower slots is free of deadlock.
    """
    slots: dict[Action, int] = {}
    positions = [0] * len(schedule)
    clocks = [0] * len(schedule)
    progress = True
    while progress:
        progress = False
        for rank, actions in enumerate(schedule):
            while positions[rank] < len(actions):
                action = actions[positions[rank]]
                # The last chunk's backward pass needs its forward pass, which this rank ran itself.
                step, first = (-1, 0) if action.kind == "F" else (1, num_chunks - 1)
                before = action._replace(chunk=action.chunk + step)
                if action.chunk != first and before not in slots:
                    break
                slots[action] = max(clocks[rank], slots.get(before, -1) + 1)
                clocks[rank] = slots[action] + 1
                positions[rank] += 1
                progress = True
    return slots
