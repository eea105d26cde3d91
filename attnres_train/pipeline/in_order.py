"""Model of communicators that execute their operations in order, as NCCL's do.

A send completes together with its receive, and only once every earlier operation of that
communicator is complete on both ranks. gloo matches each message by itself and so hides deadlocks
that this order causes; the model shows them without a GPU. Whether a set of process groups is safe
comes down to one question: is the graph of what waits for what free of cycles?
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from typing import Literal, NamedTuple

from attnres_train.pipeline.plan import Hop, TransportPlan
from attnres_train.pipeline.schedule import Action, Schedule
from attnres_train.pipeline.validate import ScheduleError


class Message(NamedTuple):
    """A part of a hop's payload, or of its gradients, on its way from ``src`` to ``dst`` rank."""

    kind: Literal["F", "B"]
    src: int
    dst: int
    chunk: int
    """The hop's source chunk."""
    micro_batch: int
    urgent: bool
    """Fresh blocks and the partial, or their gradients; else what the sender held before."""

    def __str__(self) -> str:
        what = "blocks" if self.kind == "F" else "gradients"
        part = "fresh" if self.urgent else "held"
        return (
            f"{part} {what} of hop {self.chunk} -> {self.chunk + 1}, "
            f"micro-batch {self.micro_batch}, rank {self.src} -> {self.dst}"
        )


Groups = Callable[[Message], Hashable]
"""Names the communicator that carries a message."""


def per_pair(message: Message) -> Hashable:
    """One communicator for each pair of ranks: deadlocks."""
    return frozenset((message.src, message.dst))


def per_pair_and_kind(message: Message) -> Hashable:
    """One for activations and one for gradients between two ranks: deadlocks at P = 2, where rank
    0 also receives activations from rank 1."""
    return frozenset((message.src, message.dst)), message.kind


def per_edge_and_kind(message: Message) -> Hashable:
    """One for each directed edge and kind: safe."""
    return message.src, message.dst, message.kind


def per_edge_kind_and_urgency(message: Message) -> Hashable:
    """As `per_edge_and_kind`, with one of its own for what the receiver waits for: safe."""
    return message.src, message.dst, message.kind, message.urgent


def check_in_order(
    plan: TransportPlan, schedule: Schedule, groups: Groups, *, eager: bool = True
) -> None:
    """Raise ScheduleError, naming the messages that wait for each other, if ``schedule`` hangs.

    With ``eager``, blocks that the sender held before leave ahead of its forward pass, and their
    gradients are due only at the end of the receiver's backward pass; otherwise everything leaves
    behind a pass and is due before the next. A rank issues the operations of an action when the
    pass before it is done, receives first; sends complete in the background.
    """
    graph = _Graph(groups)
    for rank, actions in enumerate(schedule):
        before: Hashable = ("start", rank)
        for action in actions:
            before = _add_action(graph, plan, rank, action, before, eager)
    if cycle := graph.find_cycle():
        waits = "; ".join(str(node) for node in cycle if isinstance(node, Message))
        raise ScheduleError(f"communicators deadlock, each waiting for the next: {waits}")


def _add_action(
    graph: _Graph, plan: TransportPlan, rank: int, action: Action, before: Hashable, eager: bool
) -> Hashable:
    """Add what ``rank`` does for one action, and return the node behind which it goes on."""
    kind, chunk, micro_batch = action
    hop_before, hop_after = plan.hop_into(chunk), plan.hop_out_of(chunk)
    incoming, outgoing = (hop_before, hop_after) if kind == "F" else (hop_after, hop_before)
    run, done = ("run", action), ("done", action)
    graph.wait(run, before)
    graph.wait(done, run)
    for message in _messages(incoming, kind, micro_batch):
        graph.issue(rank, message, before)
        late = eager and kind == "B" and not message.urgent
        graph.wait(done if late else run, message)
    for message in _messages(outgoing, kind, micro_batch):
        early = eager and kind == "F" and not message.urgent
        graph.issue(rank, message, before if early else done)
        if early:
            for received in _messages(incoming, kind, micro_batch):
                graph.wait(message, received)
    return done


def _messages(hop: Hop | None, kind: Literal["F", "B"], micro_batch: int) -> Iterator[Message]:
    """The messages of one micro-batch over ``hop`` in the order of sending: forward held blocks
    first, backward the urgent gradients first."""
    if hop is None or hop.is_local:
        return
    src, dst = (hop.src_rank, hop.dst_rank) if kind == "F" else (hop.dst_rank, hop.src_rank)
    urgent = Message(kind, src, dst, hop.src_chunk, micro_batch, True)
    held = (urgent._replace(urgent=False),) if hop.held else ()
    yield from (*held, urgent) if kind == "F" else (urgent, *held)


class _Graph:
    """Passes and messages, with an edge from each to what waits for it."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups
        self.waits_for: defaultdict[Hashable, list[Hashable]] = defaultdict(list)
        self.latest: dict[tuple[int, Hashable], Message] = {}

    def wait(self, node: Hashable, *causes: Hashable) -> None:
        self.waits_for[node].extend(causes)

    def issue(self, rank: int, message: Message, behind: Hashable) -> None:
        """Put ``message`` into its communicator's queue on ``rank``, issued behind a node."""
        queue = (rank, self.groups(message))
        self.wait(message, behind)
        if queue in self.latest:
            self.wait(message, self.latest[queue])
        self.latest[queue] = message

    def find_cycle(self) -> list[Hashable]:
        """Some cycle, or an empty list (depth-first search with an explicit stack)."""
        finished: set[Hashable] = set()
        for root in list(self.waits_for):
            path: dict[Hashable, Iterator[Hashable]] = {}
            node: Hashable | None = None if root in finished else root
            while node is not None or path:
                if node is not None:
                    path[node] = iter(self.waits_for.get(node, ()))
                current = next(reversed(path))
                node = next((cause for cause in path[current] if cause not in finished), None)
                if node in path:
                    nodes = list(path)
                    return nodes[nodes.index(node) :]
                if node is None:
                    path.popitem()
                    finished.add(current)
        return []
