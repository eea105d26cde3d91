"""Pipeline schedules: for each rank, the order of its forward and backward passes.

A schedule is nothing but a list of actions per rank, so adding one means writing a function that
returns such lists, and a class that a configuration can name (`pipeline.plan.schedule_kinds`).
`validate` proves it before the first step, and the engine runs whatever it is given. Chunk ``c``
lives on rank ``c % P`` (see `pipeline.plan.layout`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple


class Action(NamedTuple):
    """The forward ("F") or backward ("B") pass of one micro-batch through one chunk."""

    kind: Literal["F", "B"]
    chunk: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.kind}(chunk {self.chunk}, micro-batch {self.micro_batch})"


Schedule = tuple[tuple[Action, ...], ...]
"""Per rank, its actions in order."""


def megatron_warm_up(rank: int, num_ranks: int, num_virtual_stages: int) -> int:
    """Forward passes that ``rank`` runs before its first pair of one forward, one backward:
    ``P - rank - 1``, or ``2 (P - rank - 1) + (V - 1) P`` when interleaved, as in Megatron-LM."""
    ahead = num_ranks - rank - 1
    if num_virtual_stages == 1:
        return ahead
    return 2 * ahead + (num_virtual_stages - 1) * num_ranks


def one_f_one_b(
    num_ranks: int,
    num_virtual_stages: int,
    num_micro_batches: int,
    warm_up: Callable[[int, int, int], int] = megatron_warm_up,
) -> Schedule:
    """1F1B; interleaved for more than one virtual stage (arXiv 2104.04473, section 2.2).

    Micro-batches pass through a rank's chunks in groups of ``P``. Rank ``r`` runs
    ``warm_up(r, P, V)`` forward passes ahead of its first pair of one forward, one backward (none,
    or all, where that is below 0, or more than there are). A number of micro-batches that is no
    multiple of ``P`` is planned as the next multiple, and the surplus left out: a part of an order
    without deadlock, with all of each micro-batch's actions, has none either.
    """
    ranks, virtual = num_ranks, num_virtual_stages
    padded = -(-num_micro_batches // ranks) * ranks
    schedule = []
    for rank in range(ranks):
        forward = list(_passes("F", rank, ranks, virtual, padded, group=ranks))
        backward = list(_passes("B", rank, ranks, virtual, padded, group=ranks))
        ahead = min(max(0, warm_up(rank, ranks, virtual)), len(forward))
        steady = len(forward) - ahead
        actions = forward[:ahead]
        for pair in zip(forward[ahead:], backward[:steady], strict=True):
            actions.extend(pair)
        actions.extend(backward[steady:])
        schedule.append(tuple(a for a in actions if a.micro_batch < num_micro_batches))
    return tuple(schedule)


def gpipe(num_ranks: int, num_virtual_stages: int, num_micro_batches: int) -> Schedule:
    """All forward passes, then all backward passes (arXiv 1811.06965): every micro-batch's
    activations are alive at once."""
    return tuple(
        (
            *_passes(
                "F", rank, num_ranks, num_virtual_stages, num_micro_batches, num_micro_batches
            ),
            *_passes(
                "B", rank, num_ranks, num_virtual_stages, num_micro_batches, num_micro_batches
            ),
        )
        for rank in range(num_ranks)
    )


def forward_only(num_ranks: int, num_virtual_stages: int, num_micro_batches: int) -> Schedule:
    """The forward passes of `one_f_one_b`, for validation."""
    return tuple(
        tuple(_passes("F", rank, num_ranks, num_virtual_stages, num_micro_batches, num_ranks))
        for rank in range(num_ranks)
    )


def peak_in_flight(actions: Iterable[Action], weight: Sequence[float]) -> float:
    """The largest sum, over a rank's ``actions``, of ``weight[chunk]`` over the passes whose
    backward pass is still to come: activation memory, if that is what a chunk weighs."""
    alive = peak = 0.0
    for kind, chunk, _ in actions:
        alive += weight[chunk] if kind == "F" else -weight[chunk]
        peak = max(peak, alive)
    return peak


def _passes(
    kind: Literal["F", "B"],
    rank: int,
    num_ranks: int,
    num_virtual_stages: int,
    num_micro_batches: int,
    group: int,
) -> Iterable[Action]:
    """The passes of one kind on ``rank``: group by group of micro-batches through every chunk, the
    chunks in model order for forward passes and in reverse for backward ones."""
    chunks = range(rank, num_ranks * num_virtual_stages, num_ranks)
    for start in range(0, num_micro_batches, group):
        for chunk in chunks if kind == "F" else reversed(chunks):
            for micro_batch in range(start, min(start + group, num_micro_batches)):
                yield Action(kind, chunk, micro_batch)
