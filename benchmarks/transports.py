"""Other ways to carry the history, as transport plans for the same engine.

Each gives up one thing that the exact plan with eager forwarding does. Where a hop carries more
than the plan of the layout foresees, the surplus are tensors of their own: a chunk "makes" what it
passes on, and the chunk after it reads it.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise

from attnres_train.pipeline.plan.layout import Layout
from attnres_train.pipeline.plan.transport_plan import Hop, TransportPlan


class LatePlan(TransportPlan):
    """The exact payload, all of it sent after the pass and waited for before the next."""

    def _hop(self, src: int) -> Hop:
        hop = super()._hop(src)
        return replace(hop, held=(), fresh=hop.blocks)

    def used_inside(self, chunk: int) -> range:
        return range(0)


class PaddedPlan(LatePlan):
    """The exact payload, with every hop padded to the widest one."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        widest = max(hop.units for hop in self.hops)
        counts = (widest - hop.units for hop in self.hops)
        bounds = accumulate(counts, initial=layout.blocks.num_blocks)
        self._padding = [range(*pair) for pair in pairwise(bounds)]
        self.hops = tuple(
            replace(hop, fresh=(*hop.fresh, *padding))
            for hop, padding in zip(self.hops, self._padding, strict=True)
        )

    def reads(self, chunk: int) -> tuple[int, ...]:
        return *super().reads(chunk), *(self._padding[chunk - 1] if chunk else ())

    def produced(self, chunk: int) -> tuple[int, ...]:
        padding = self._padding[chunk] if chunk < len(self._padding) else ()
        return *super().produced(chunk), *padding


class NaivePlan(TransportPlan):
    """The full history on every hop. Tensors are numbered hop by hop."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        true = TransportPlan(layout)
        counts = (len(true.reads(chunk)) for chunk in range(layout.num_chunks))
        self._into = [range(*pair) for pair in pairwise(accumulate(counts, initial=0))]
        self.hops = tuple(
            replace(hop, held=(), fresh=tuple(self._into[hop.dst_chunk])) for hop in true.hops
        )

    def reads(self, chunk: int) -> range:
        return self._into[chunk]

    def produced(self, chunk: int) -> range:
        return self._into[chunk + 1] if chunk + 1 < len(self._into) else range(0)

    def used_inside(self, chunk: int) -> range:
        return range(0)
