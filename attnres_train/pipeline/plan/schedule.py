"""Pipeline schedules: for each rank, the order of its forward and backward passes.

A schedule is nothing but a list of actions per rank, so adding one means writing a function that
returns such lists; `validate` proves it before the first step, and the engine runs whatever it is
given. Chunk ``c`` lives on rank ``c % P`` (see `pipeline.plan.layout`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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


def one_f_one_b(num_ranks: int, num_virtual_stages: int, num_micro_batches: int) -> Schedule:
    """1F1B; interleaved for more than one virtual stage (arXiv 2104.04473, section 2.2).

    Micro-batches pass through a rank's chunks in groups of ``P``. Rank ``r`` runs ``P - r - 1``
    forward passes ahead of its first backward, or ``2 (P - r - 1) + (V - 1) P`` when interleaved,
    as Megatron-LM does. A number of micro-batches that is no multiple of ``P`` is planned as the
    next multiple, and the surplus left out: a part of an order without deadlock, with all of each
    micro-batch's actions, has none either.
    """
    ranks, virtual = num_ranks, num_virtual_stages
    padded = -(-num_micro_batches // ranks) * ranks
    schedule = []
    for rank in range(ranks):
        forward = list(_passes("F", rank, ranks, virtual, padded, group=ranks))
        backward = list(_passes("B", rank, ranks, virtual, padded, group=ranks))
        ahead = ranks - rank - 1
        warm_up = ahead if virtual == 1 else 2 * ahead + (virtual - 1) * ranks
        warm_up = min(warm_up, len(forward))
        steady = len(forward) - warm_up
        actions = forward[:warm_up]
        for pair in zip(forward[warm_up:], backward[:steady], strict=True):
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


SCHEDULES = {"1f1b": one_f_one_b, "gpipe": gpipe}
"""Training schedules by name: functions of ranks, virtual stages and micro-batches."""


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
