"""What crosses each hop in a simulated step, by the way in which the history is carried."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from attnres_train.pipeline.plan.transport_plan import Hop, TransportPlan

Mode = Literal["standard", "naive", "padded", "exact", "eager"]
"""What a hop carries (see `transport_plan.Units`); ``eager`` is the exact payload with every tensor
sent as soon as it is there, and its gradients due only when the receiver's pass comes to it."""
MODES: tuple[Mode, ...] = ("standard", "naive", "padded", "exact", "eager")
MAX_RUNS = 256
"""Held blocks leave one by one, in long pipelines in so many runs over all hops: to save time."""


class Part(NamedTuple):
    """What leaves together over a hop, once per micro-batch and direction."""

    units: int
    share: float = 1.0
    """Of the sender's forward pass, after which it leaves: 0 for what the sender held before. Its
    gradients are due when the receiver's backward pass has just this share of itself left."""
    blocks: tuple[int, ...] = ()
    """Where the transport is the plan's, what the part is made of; ascending."""
    partial: bool = False


def parts(plan: TransportPlan, mode: Mode) -> list[tuple[Part, ...]]:
    """Per hop, what crosses it under ``mode``, in the order of sending forward."""
    widest = max((hop.units for hop in plan.hops), default=0)

    def of(hop: Hop) -> tuple[Part, ...]:
        if hop.is_local:
            return ()
        if mode == "eager":
            return tuple(_eager_parts(plan, hop))
        if mode == "exact":
            return (Part(hop.units, 1.0, hop.blocks, hop.partial),)
        history = len(plan.reads(hop.dst_chunk)) + hop.partial_units
        return (Part({"standard": 1, "naive": history, "padded": widest}[mode]),)

    return [of(hop) for hop in plan.hops]


def _eager_parts(plan: TransportPlan, hop: Hop) -> Iterator[Part]:
    runs = max(1, MAX_RUNS // len(plan.hops))
    length = -(-len(hop.held) // runs) or 1
    for start in range(0, len(hop.held), length):
        held = hop.held[start : start + length]
        yield Part(len(held), 0.0, held)
    for block in hop.fresh:
        yield Part(1, ready_share(plan, hop.src_chunk, block), (block,))
    if hop.partial:
        yield Part(hop.partial_units, 1.0, partial=True)


def ready_share(plan: TransportPlan, chunk: int, block: int | None) -> float:
    """The share of ``chunk``'s forward pass after which it can send a block that it completes (or
    its partial, None): what it does not read itself leaves at its end."""
    if block is None or block not in plan.used_inside(chunk):
        return 1.0
    sublayers = plan.layout.sublayers(chunk)
    # The embedding's last sublayer is number 0, before the first of the chunk: ready at once.
    return max(0, plan.layout.blocks.ends[block] + 1 - sublayers.start) / len(sublayers)
