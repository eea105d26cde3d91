"""Proof that a schedule and a transport plan fit together, made before the first step.

An abstract interpreter runs every rank's actions on sets of block numbers in place of tensors. What
it accepts cannot deadlock (sends being asynchronous), delivers every (micro-batch, block, rank)
exactly once, reads only what is held, collects every gradient and leaves nothing behind. The order
of operations inside communicators is checked separately, by `in_order`.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from attnres_train.pipeline.plan import TransportPlan
from attnres_train.pipeline.schedule import Action, Schedule


class ScheduleError(Exception):
    """A schedule or plan that would hang, or compute something else; names rank and action."""


@dataclass(frozen=True)
class Report:
    """What each rank holds at most, over the step."""

    peak_blocks: tuple[int, ...]
    """Stored blocks, each micro-batch's counted; units of micro-batch tokens x hidden_size."""
    peak_partials: tuple[int, ...]
    """Stored partials that chunks took as input; same units."""


def validate(plan: TransportPlan, schedule: Schedule) -> Report:
    """Run ``schedule`` abstractly under ``plan``.

    A schedule without any backward pass is checked as a forward-only one, in which a micro-batch's
    blocks go behind the rank's last chunk. Raises ScheduleError with the first fault found.
    """
    layout = plan.layout
    if len(schedule) != layout.num_ranks:
        raise ScheduleError(f"schedule for {len(schedule)} ranks, layout for {layout.num_ranks}")
    training = any(action.kind == "B" for actions in schedule for action in actions)
    ranks = [_Rank(rank, plan, training) for rank in range(layout.num_ranks)]
    _run(ranks, schedule, layout.num_chunks - 1)
    _check_complete(schedule, layout.num_chunks, training)
    for rank in ranks:
        rank.check_empty()
    return Report(
        peak_blocks=tuple(rank.peak_blocks for rank in ranks),
        peak_partials=tuple(rank.peak_partials for rank in ranks),
    )


def _run(ranks: list[_Rank], schedule: Schedule, last_chunk: int) -> None:
    """Run every rank until it waits for a message, and again when the message is there.

    A message is named by the action that it enables.
    """
    position = [0] * len(ranks)
    arrived: set[Action] = set()
    waiting: dict[Action, int] = {}
    runnable = deque(range(len(ranks)))
    while runnable:
        rank = runnable.popleft()
        while position[rank] < len(schedule[rank]):
            action = schedule[rank][position[rank]]
            starts = action.chunk == (0 if action.kind == "F" else last_chunk)
            if not starts and action not in arrived:
                waiting[action] = rank
                break
            arrived.discard(action)
            ranks[rank].execute(action)
            position[rank] += 1
            step = 1 if action.kind == "F" else -1
            enabled = action._replace(chunk=action.chunk + step)
            if 0 <= enabled.chunk <= last_chunk:
                arrived.add(enabled)
                if enabled in waiting:
                    runnable.append(waiting.pop(enabled))
    if waiting:
        stuck = "; ".join(f"rank {rank} before {action}" for action, rank in waiting.items())
        raise ScheduleError(f"deadlock: {stuck}")


def _check_complete(schedule: Schedule, num_chunks: int, training: bool) -> None:
    """Every micro-batch passes every chunk (that none does so twice is found on the way)."""
    done = {action for actions in schedule for action in actions}
    micro_batches = 1 + max((action.micro_batch for action in done), default=-1)
    for kind in "FB" if training else "F":
        for chunk in range(num_chunks):
            for micro_batch in range(micro_batches):
                if (kind, chunk, micro_batch) not in done:
                    raise ScheduleError(f"{Action(kind, chunk, micro_batch)} is never run")


@dataclass
class _Rank:
    """The abstract state of one rank."""

    rank: int
    plan: TransportPlan
    training: bool
    store: defaultdict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    """Micro-batch -> blocks held."""
    deposits: defaultdict[int, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    """Micro-batch -> block -> gradient contributions so far."""
    in_flight: set[tuple[int, int]] = field(default_factory=set)
    """(chunk, micro-batch) between forward and backward pass."""
    done: set[Action] = field(default_factory=set)
    num_blocks: int = 0
    num_partials: int = 0
    peak_blocks: int = 0
    peak_partials: int = 0

    def execute(self, action: Action) -> None:
        if self.plan.layout.rank_of(action.chunk) != self.rank:
            raise self._error(action, "another rank holds that chunk")
        if action in self.done:
            raise self._error(action, "runs a second time")
        self.done.add(action)
        if action.kind == "F":
            self._forward(action)
        else:
            self._backward(action)

    def _forward(self, action: Action) -> None:
        _, chunk, micro_batch = action
        plan, store = self.plan, self.store[micro_batch]
        self._add(action, plan.received(chunk), "is delivered")
        hop_in, hop_out = plan.hop_into(chunk), plan.hop_out_of(chunk)
        self._require(action, plan.reads(chunk), "to read it")
        self._require(action, hop_out.held if hop_out else (), "to send it before its pass")
        self._add(action, plan.produced(chunk), "is produced")
        self._require(action, hop_out.fresh if hop_out else (), "to send it behind its pass")
        self.num_partials += bool(hop_in and hop_in.partial)
        self.peak_blocks = max(self.peak_blocks, self.num_blocks)
        self.peak_partials = max(self.peak_partials, self.num_partials)
        self.in_flight.add((chunk, micro_batch))
        if not self.training:
            self._close(action)
            if chunk == plan.layout.chunks_of(self.rank)[-1]:
                self._release(action, tuple(store))

    def _backward(self, action: Action) -> None:
        _, chunk, micro_batch = action
        if (chunk, micro_batch) not in self.in_flight:
            raise self._error(action, "its forward pass has not run")
        plan, deposits = self.plan, self.deposits[micro_batch]
        hop_out = plan.hop_out_of(chunk)
        if hop_out:
            self._require(action, hop_out.blocks, "to take its gradient")
            deposits.update(hop_out.blocks)
        self._require(action, plan.reads(chunk), "to read it again")
        deposits.update(plan.reads(chunk))
        brought = (*plan.received(chunk), *plan.produced(chunk))
        for block in brought:
            expected = plan.expected_deposits(self.rank, block)
            if (found := deposits.pop(block, 0)) != expected:
                what = f"block {block} has {found} gradient deposits, not {expected}"
                raise self._error(action, what)
        self._release(action, brought)
        self._close(action)

    def _add(self, action: Action, blocks: Iterable[int], how: str) -> None:
        store = self.store[action.micro_batch]
        if not store.isdisjoint(blocks):
            twice = min(store.intersection(blocks))
            raise self._error(action, f"block {twice} {how} but is held already")
        before = len(store)
        store.update(blocks)
        self.num_blocks += len(store) - before

    def _require(self, action: Action, blocks: Iterable[int], purpose: str) -> None:
        if not self.store[action.micro_batch].issuperset(blocks):
            missing = min(set(blocks) - self.store[action.micro_batch])
            raise self._error(action, f"block {missing} is not held, {purpose}")

    def _release(self, action: Action, blocks: Iterable[int]) -> None:
        store = self.store[action.micro_batch]
        before = len(store)
        store.difference_update(blocks)
        self.num_blocks -= before - len(store)
        if not store:
            del self.store[action.micro_batch]

    def _close(self, action: Action) -> None:
        _, chunk, micro_batch = action
        hop_in = self.plan.hop_into(chunk)
        self.num_partials -= bool(hop_in and hop_in.partial)
        self.in_flight.remove((chunk, micro_batch))

    def check_empty(self) -> None:
        """Raise ScheduleError if blocks or gradients outlive the step."""
        for micro_batch, blocks in self.store.items():
            if blocks:
                raise ScheduleError(
                    f"rank {self.rank}: micro-batch {micro_batch}: blocks {sorted(blocks)} are "
                    "never released"
                )
        for micro_batch, deposits in self.deposits.items():
            if deposits:
                raise ScheduleError(
                    f"rank {self.rank}: micro-batch {micro_batch}: gradients of blocks "
                    f"{sorted(deposits)} are never used"
                )

    def _error(self, action: Action, what: str) -> ScheduleError:
        return ScheduleError(f"rank {self.rank}: {action}: {what}")
