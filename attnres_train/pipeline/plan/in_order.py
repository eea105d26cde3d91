"""Model of communicators that execute their operations in order, as NCCL's do.

A send completes together with its receive, and only once every earlier operation of that
communicator is complete on both ranks. gloo matches each message by itself and so hides deadlocks
that this order causes; the model shows them without a GPU. It follows the very programs that the
engine runs, message by message. Whether a set of process groups is safe comes down to one question:
is the graph of what waits for what free of cycles?
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence

from attnres_train.pipeline.plan.messages import Message
from attnres_train.pipeline.plan.program import Program
from attnres_train.pipeline.plan.validate import ScheduleError

Groups = Callable[[Message], Hashable]
"""Names the communicator that carries a message."""


def per_pair(message: Message) -> Hashable:
    """One communicator for each pair of ranks: deadlocks."""
    return frozenset(message.channel[:2])


def per_pair_and_kind(message: Message) -> Hashable:
    """One for activations and one for gradients between two ranks: deadlocks at P = 2, where rank
    0 also receives activations from rank 1."""
    return frozenset(message.channel[:2]), message.channel.kind


def per_channel(message: Message) -> Hashable:
    """One for each directed edge and kind, as `transport.P2PTransport` has them: safe."""
    return message.channel


def check_in_order(programs: Sequence[Program], groups: Groups) -> None:
    """Raise ScheduleError, naming the messages that wait for each other, if ``programs``, those of
    all ranks, hang.

    What a rank issues starts when the rank has come to that point, for on CUDA the operations of a
    communicator wait for the stream that computes. A send is waited for where it is overdue, though
    it may be known to be done before.
    """
    graph = _Graph(groups)
    for program in programs:
        _follow(graph, program)
    if cycle := graph.find_cycle():
        waits = "; ".join(_told(node) for node in cycle if isinstance(node, Message))
        raise ScheduleError(f"communicators deadlock, each waiting for the next: {waits}")


def _follow(graph: _Graph, program: Program) -> None:
    """Add what one rank does, in the order in which the engine does it."""
    rank, sent = program.rank, []
    point = rank, 0  # how far the rank has come: it has waited for so many messages

    def wait_for(message: Message) -> None:
        nonlocal point
        point, before = (rank, point[1] + 1), point
        graph.wait(point, before, message)

    for step in program.steps:
        for message in step.posted:
            graph.issue(rank, message, point)
        for message in (*step.before, *step.inside, *step.after):
            if program.sends(message):
                graph.issue(rank, message, point)
                sent.append(message)
            else:
                wait_for(message)
        # As `Outbox.reap`, but for sends that are known to be done before they are due.
        for message in [message for message in sent if program.due(message) < step.slot]:
            wait_for(message)
            sent.remove(message)
    for message in sent:
        wait_for(message)


def _told(message: Message) -> str:
    return f"{message}, rank {message.channel.src_rank} -> {message.channel.dst_rank}"


class _Graph:
    """Points that ranks come to, and messages, each with what it waits for."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups
        self.waits_for: defaultdict[Hashable, list[Hashable]] = defaultdict(list)
        self.latest: dict[tuple[int, Hashable], Message] = {}

    def wait(self, node: Hashable, *causes: Hashable) -> None:
        self.waits_for[node].extend(causes)

    def issue(self, rank: int, message: Message, after: Hashable) -> None:
        """Put ``message`` into its communicator's queue on ``rank``, issued after a node."""
        queue = (rank, self.groups(message))
        self.wait(message, after)
        # A message is one node for both ranks, so it waits for what is before it in either queue.
        if queue in self.latest:
            self.wait(message, self.latest[queue])
        self.latest[queue] = message

    def find_cycle(self) -> list[Hashable]:
        """Some cycle, or an empty list (depth-first search with an explicit stack)."""
        finished: set[Hashable] = set()
        for root in list(self.waits_for):
            path: dict[Hashable, Iterator[Hashable]] = {}  # a stack in which to look up a node
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
