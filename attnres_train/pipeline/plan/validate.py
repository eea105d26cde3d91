"""Proof that a schedule and a transport plan fit together, made before the first step.

An abstract interpreter runs every rank's actions on sets of block numbers in place of tensors. What
it accepts cannot deadlock (sends being asynchronous), delivers every (micro-batch, block, rank)
exactly once, reads only what is held, collects every gradient and leaves nothing behind. The order
of operations inside communicators is checked separately, by `in_order`.

Whatever the schedule, a micro-batch goes F(0), ..., F(C-1), B(C-1), ..., B(0): each pass waits for
the one before it. What it moves, holds and releases is therefore followed once, for one
micro-batch; the schedule decides whether the passes can all run, and how much is held at a time.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from attnres_train.pipeline.plan.schedule import Action, Schedule
from attnres_train.pipeline.plan.transport_plan import TransportPlan


class ScheduleError(Exception):
    """A schedule or plan that would hang, or compute something else; names rank and action."""


@dataclass(frozen=True)
class Report:
    """What each rank holds at most, over the step, in units of micro-batch tokens x hidden_size."""

    peak_blocks: tuple[int, ...]
    """Stored blocks, each micro-batch's counted."""
    peak_partials: tuple[int, ...]
    """Stored partials that chunks took as input, in units."""


def validate(plan: TransportPlan, schedule: Schedule) -> Report:
    """Run ``schedule`` abstractly under ``plan``.

    A schedule without any backward pass is checked as a forward-only one, in which a micro-batch's
    blocks go after the rank's last chunk. Raises ScheduleError with the first fault found.
    """
    layout = plan.layout
    if len(schedule) != layout.num_ranks:
        raise ScheduleError(f"schedule for {len(schedule)} ranks, layout for {layout.num_ranks}")
    training = any(action.kind == "B" for actions in schedule for action in actions)
    # In this order: what comes later takes for granted what has been proved before.
    _check_complete(plan, schedule, training)
    _check_progress(plan, schedule)
    _check_data_flow(plan, training)
    peaks = [_peaks(plan, rank, actions, training) for rank, actions in enumerate(schedule)]
    return Report(*(tuple(kind) for kind in zip(*peaks, strict=True)))


def _check_complete(plan: TransportPlan, schedule: Schedule, training: bool) -> None:
    """Every micro-batch passes every chunk once in each direction, on the chunk's rank."""
    done: set[Action] = set()
    for rank, actions in enumerate(schedule):
        for action in actions:
            if plan.layout.rank_of(action.chunk) != rank:
                raise _error(rank, action, "another rank holds that chunk")
            if action in done:
                raise _error(rank, action, "runs a second time")
            done.add(action)
    micro_batches = 1 + max((action.micro_batch for action in done), default=-1)
    kinds: tuple[Literal["F", "B"], ...] = ("F", "B") if training else ("F",)
    for kind in kinds:
        for chunk in range(plan.layout.num_chunks):
            for micro_batch in range(micro_batches):
                if (kind, chunk, micro_batch) not in done:
                    raise ScheduleError(f"{Action(kind, chunk, micro_batch)} is never run")


def _check_progress(plan: TransportPlan, schedule: Schedule) -> None:
    """Run each rank until it waits for a pass of another, and again when that has run."""
    last = plan.layout.num_chunks - 1
    position = [0] * len(schedule)
    done: set[Action] = set()
    waiting: dict[Action, int] = {}  # of one rank each: a pass has one that follows it
    runnable = deque(range(len(schedule)))
    while runnable:
        rank = runnable.popleft()
        while position[rank] < len(schedule[rank]):
            action = schedule[rank][position[rank]]
            needed = _pass_before(action, last)
            if needed and needed not in done:
                waiting[needed] = rank
                break
            done.add(action)
            position[rank] += 1
            if action in waiting:
                runnable.append(waiting.pop(action))
    if waiting:
        stuck = (
            f"rank {rank} before {schedule[rank][position[rank]]}" for rank in waiting.values()
        )
        raise ScheduleError(f"deadlock: {'; '.join(stuck)}")


def _pass_before(action: Action, last_chunk: int) -> Action | None:
    """The pass of the same micro-batch whose result ``action`` waits for."""
    kind, chunk, micro_batch = action
    if kind == "F":
        return Action("F", chunk - 1, micro_batch) if chunk else None
    if chunk == last_chunk:
        return Action("F", chunk, micro_batch)
    return Action("B", chunk + 1, micro_batch)


def _check_data_flow(plan: TransportPlan, training: bool) -> None:
    """Follow one micro-batch through all chunks and back."""
    ranks = [_Held(rank, plan) for rank in range(plan.layout.num_ranks)]
    chunks = range(plan.layout.num_chunks)
    for chunk in chunks:
        rank = ranks[plan.layout.rank_of(chunk)]
        rank.forward(Action("F", chunk, 0))
        if not training and chunk == plan.layout.chunks_of(rank.rank)[-1]:
            rank.blocks.clear()
    for chunk in reversed(chunks) if training else ():
        ranks[plan.layout.rank_of(chunk)].backward(Action("B", chunk, 0))
    for rank in ranks:
        if rank.blocks or rank.deposits:
            left = sorted(rank.blocks | set(rank.deposits))
            raise ScheduleError(f"rank {rank.rank}: blocks {left} are never released")


@dataclass
class _Held:
    """What one rank holds of one micro-batch."""

    rank: int
    plan: TransportPlan
    blocks: set[int] = field(default_factory=set)
    deposits: Counter[int] = field(default_factory=Counter)
    """Gradient contributions to each block so far."""

    def forward(self, action: Action) -> None:
        plan, chunk = self.plan, action.chunk
        hop = plan.hop_out_of(chunk)
        # In the engine's order, so that what leaves before the pass is not what the pass makes.
        self._add(action, plan.received(chunk), "is delivered")
        self._require(action, plan.reads(chunk), "to read it")
        self._require(action, hop.held if hop else (), "to send it before its pass")
        self._add(action, plan.produced(chunk), "is produced")
        self._require(action, hop.fresh if hop else (), "to send it after its pass")

    def backward(self, action: Action) -> None:
        plan, chunk = self.plan, action.chunk
        hop = plan.hop_out_of(chunk)
        returned = hop.blocks if hop else ()
        self._require(action, returned, "to take its gradient")
        self._require(action, plan.reads(chunk), "to read it again")
        self.deposits.update(returned)
        self.deposits.update(plan.reads(chunk))
        # What this chunk brought here goes now: later chunks, which read it too, are done.
        for block in (*plan.received(chunk), *plan.produced(chunk)):
            expected = plan.expected_deposits(self.rank, block)
            if (found := self.deposits.pop(block, 0)) != expected:
                what = f"block {block} has {found} gradient deposits, not {expected}"
                raise _error(self.rank, action, what)
            self.blocks.remove(block)

    def _add(self, action: Action, blocks: Iterable[int], how: str) -> None:
        for block in blocks:
            if block in self.blocks:
                raise _error(self.rank, action, f"block {block} {how} but is held already")
            self.blocks.add(block)

    def _require(self, action: Action, blocks: Iterable[int], purpose: str) -> None:
        for block in blocks:
            if block not in self.blocks:
                raise _error(self.rank, action, f"block {block} is not held, {purpose}")


def _peaks(
    plan: TransportPlan, rank: int, actions: Iterable[Action], training: bool
) -> tuple[int, int]:
    """The most blocks, and the most units of input partials, that ``rank`` holds at a time."""
    chunks = plan.layout.chunks_of(rank)
    brought = {chunk: len(plan.received(chunk)) + len(plan.produced(chunk)) for chunk in chunks}
    hops = {chunk: plan.hop_into(chunk) for chunk in chunks}
    partial = {chunk: hop.partial_units if hop else 0 for chunk, hop in hops.items()}
    blocks = partials = peak_blocks = peak_partials = 0
    for kind, chunk, _ in actions:
        if kind == "B":
            blocks -= brought[chunk]
            partials -= partial[chunk]
            continue
        blocks += brought[chunk]
        partials += partial[chunk]
        peak_blocks, peak_partials = max(peak_blocks, blocks), max(peak_partials, partials)
        if not training:  # let go after the pass, as the engine's `_forget` does
            partials -= partial[chunk]
            blocks -= sum(brought.values()) if chunk == chunks[-1] else 0
    return peak_blocks, peak_partials


def _error(rank: int, action: Action, what: str) -> ScheduleError:
    return ScheduleError(f"rank {rank}: {action}: {what}")
