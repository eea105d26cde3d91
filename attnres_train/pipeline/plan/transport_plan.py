"""Transport plan: exactly which blocks cross which hop, computed from the layout alone.

A rank keeps every block it ever received or produced, and the next rank is sent only what it does
not hold. A chunk reads every block that is complete before it, so when a chunk starts its rank
holds all of those; what the rank lacks at its next chunk is the range of blocks that were completed
in between. Every payload is such a range, and no rank ever gets a block twice.

The *unit* is one tensor of micro-batch tokens x hidden_size: a block, or a partial, unless the
residual's partial is several units (`Blocks.partial_units`). (The partial of hyper-connections is
one unit, as wide as all their streams.)
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property

from attnres_train.pipeline.plan.layout import Layout


@dataclass(frozen=True)
class Hop:
    """What one micro-batch carries from chunk ``src_chunk`` to the next one, forward.

    The gradients of the same tensors travel back. On a local hop (one rank) nothing is sent: the
    partial is handed over and the rank holds every block.
    """

    src_chunk: int
    dst_chunk: int
    src_rank: int
    dst_rank: int
    held: tuple[int, ...]
    """Blocks that the sender holds before it computes ``src_chunk``, ascending."""
    fresh: tuple[int, ...]
    """Blocks completed in ``src_chunk``, ascending, all above ``held``."""
    partial_units: int
    """Units of the running sum that is handed on where the boundary lies inside a block; else 0."""

    @property
    def partial(self) -> bool:
        """Whether the boundary lies inside a block."""
        return self.partial_units > 0

    @property
    def is_local(self) -> bool:
        return self.src_rank == self.dst_rank

    @cached_property
    def blocks(self) -> tuple[int, ...]:
        return self.held + self.fresh

    @property
    def units(self) -> int:
        """What is on the wire per micro-batch and direction."""
        return 0 if self.is_local else len(self.blocks) + self.partial_units


@dataclass(frozen=True)
class Units:
    """Units sent per micro-batch and direction, over all hops, by ways to carry the history."""

    standard: int
    """Standard residual stream: one tensor per hop."""
    naive: int
    """The full history on every hop."""
    padded: int
    """The exact payload, every hop padded to the widest."""
    paper: float
    """arXiv 2603.15031 Eq. 8: a cache of received blocks; without embedding and partials."""
    exact: int
    """This plan."""
    bound: int
    """The lower bound for this layout."""


class TransportPlan:
    """Hops and block lifetimes of ``layout``; equal on every rank, no handshake needed."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        blocks, num_chunks = layout.blocks, layout.num_chunks
        # By chunk, how many blocks are complete before it, and after the last. Block 0, too, is
        # made by a chunk: none are there before the first.
        starts = (layout.sublayers(chunk).start for chunk in range(1, num_chunks))
        self._complete_before = (0, *map(blocks.completed_before, starts), blocks.num_blocks)
        self.hops = tuple(self._hop(chunk) for chunk in range(num_chunks - 1))

    def _hop(self, src: int) -> Hop:
        layout, complete, dst = self.layout, self._complete_before, src + 1
        blocks = layout.blocks
        previous = dst - layout.num_ranks  # the receiver's chunk before this one
        # Of `previous` the receiver has all that it read and all that it made; since then it has
        # been sent nothing. A first chunk finds the rank empty.
        missing = complete[previous + 1] if previous >= 0 else 0
        first_fresh = max(missing, complete[src])  # on one rank, which lacks nothing: `missing`
        return Hop(
            src,
            dst,
            layout.rank_of(src),
            layout.rank_of(dst),
            held=tuple(range(missing, complete[src])),
            fresh=tuple(range(first_fresh, complete[dst])),
            partial_units=blocks.partial_units * blocks.partial_after(layout.sublayers(src)[-1]),
        )

    def hop_into(self, chunk: int) -> Hop | None:
        return self.hops[chunk - 1] if chunk > 0 else None

    def hop_out_of(self, chunk: int) -> Hop | None:
        return self.hops[chunk] if chunk < len(self.hops) else None

    def reads(self, chunk: int) -> range:
        """Blocks complete before ``chunk``: its sources, all held by its rank when it starts."""
        return range(self._complete_before[chunk])

    def produced(self, chunk: int) -> range:
        """Blocks that ``chunk`` completes; the first chunk also makes block 0, the embedding."""
        return range(self._complete_before[chunk], self._complete_before[chunk + 1])

    def used_inside(self, chunk: int) -> range:
        """Those that ``chunk`` completes and goes on to read itself."""
        produced, last = self.produced(chunk), self.layout.sublayers(chunk)[-1]
        if chunk == self.layout.num_chunks - 1:
            return produced  # the output head reads them all
        return range(produced.start, max(produced.start, self.layout.blocks.completed_before(last)))

    def received(self, chunk: int) -> tuple[int, ...]:
        """Blocks that arrive for ``chunk`` and stay on its rank until its backward."""
        hop = self.hop_into(chunk)
        return hop.blocks if hop else ()

    @cached_property
    def bring(self) -> dict[tuple[int, int], int]:
        """(rank, block) -> the chunk that puts the block on the rank: its producer, or the chunk
        for which it is received. The block is released at that chunk's backward, the last on this
        rank to need it (backward visits chunks in descending order)."""
        return {
            (self.layout.rank_of(chunk), block): chunk
            for chunk in range(self.layout.num_chunks)
            for block in (*self.received(chunk), *self.produced(chunk))
        }

    def expected_deposits(self, rank: int, block: int) -> int:
        """Gradient contributions that a block stored on ``rank`` collects per micro-batch: one from
        each chunk that reads it there, one over each hop that carried it away. What the chunk that
        completes a block reads of it itself stays inside that chunk's own graph."""
        return self._deposits[rank, block]

    @cached_property
    def _deposits(self) -> dict[tuple[int, int], int]:
        deposits = dict.fromkeys(self.bring, 0)
        for chunk in range(self.layout.num_chunks):
            hop = self.hop_out_of(chunk)
            for block in (*self.reads(chunk), *(hop.blocks if hop else ())):
                deposits[self.layout.rank_of(chunk), block] += 1
        return deposits

    def units(self) -> Units:
        """Traffic of this layout under every way to carry the history."""
        layout = self.layout
        ranks, virtual, chunks = layout.num_ranks, layout.num_virtual_stages, layout.num_chunks
        wire = [hop for hop in self.hops if not hop.is_local]
        blocks_per_chunk = max(layout.blocks.num_blocks - 1, 0) / chunks
        return Units(
            standard=len(wire),
            naive=sum(len(self.reads(hop.dst_chunk)) + hop.partial_units for hop in wire),
            padded=len(wire) * max((hop.units for hop in wire), default=0),
            paper=(ranks * (ranks - 1) / 2 + (virtual - 1) * ranks**2) * blocks_per_chunk,
            exact=sum(hop.units for hop in wire),
            bound=lower_bound(layout),
        )


def lower_bound(layout: Layout) -> int:
    """The fewest units per micro-batch and direction that any transport needs, from block ends
    alone: each block must reach every rank that has a chunk after the one that completes it, and
    the partial must cross every boundary between ranks that lies inside a block.

    Looped placement: ``sum_b min(P - 1, C - 1 - p(b)) + U``, where chunk ``p(b)`` completes ``b``
    and U are the units of all partials.
    """
    # Not from the hops: their plan is measured against this.
    block_ends = layout.blocks.ends
    chunk_ends = [layout.sublayers(chunk)[-1] for chunk in range(layout.num_chunks)]
    inner_ends = chunk_ends[:-1] if layout.num_ranks > 1 else []
    partials = sum(end not in block_ends for end in inner_ends)
    deliveries = 0
    for block_end in block_ends:
        producer = bisect_left(chunk_ends, block_end)
        deliveries += min(layout.num_ranks - 1, layout.num_chunks - 1 - producer)
    return deliveries + partials * layout.blocks.partial_units
