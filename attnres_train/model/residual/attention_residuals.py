"""Attention Residuals as the paper trains them (arXiv 2603.15031): ``kind: full`` and ``block``.

Shapes: D hidden size; every tensor of the stream is [B, T, D].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from attnres_train.model.blocks import Blocks
from attnres_train.model.depth.attention import depth_attention, depth_phase2, depth_weights
from attnres_train.model.depth.fla import normed_read_kernel, run_normed_read
from attnres_train.model.depth.shared_reads import SharedReads
from attnres_train.model.norm import RMSNorm
from attnres_train.model.residual.stream import Residual, ResidualStream


class DepthQuery(NamedTuple):
    """Pseudo-query [D] and key-norm weight [D] of one depth read."""

    query: Tensor
    norm: Tensor
    eps: float

    def attend(self, sources: Sequence[Tensor]) -> Tensor:
        """Attention over depth (arXiv 2603.15031, Eq. 6); over one source it is the identity."""
        if len(sources) == 1:
            return sources[0]
        return depth_attention(self.query, self.norm, sources, self.eps)

    def attend_normed(self, sources: Sequence[Tensor], norm: RMSNorm) -> Tensor | None:
        """`attend` and ``norm`` after it by one kernel of fla's; None where it does not apply."""
        kernel = normed_read_kernel(sources, self.eps, norm.eps)
        if kernel is None:
            return None
        return run_normed_read(kernel, self.query, self.norm, sources, norm.weight, self.eps)


class DepthStream(ResidualStream):
    """A sublayer reads by attention over the finished blocks and the partial.

    With ``two_phase`` the finished blocks are read once for all of ``readers`` that see the same
    ones (Alg. 1, phase 1), and every read merges the partial into its share (phase 2).
    """

    def __init__(
        self,
        plan: Blocks,
        readers: Mapping[int, DepthQuery],
        blocks: Sequence[Tensor],
        partial: Tensor | None,
        two_phase: bool,
    ) -> None:
        super().__init__(plan, readers, blocks, partial)
        self.two_phase = two_phase
        self._shared: SharedReads | None = None

    def reader(self, sublayer: int) -> Callable[[Tensor | None], Tensor]:
        own: DepthQuery = self.readers[sublayer]
        blocks = tuple(self.blocks)
        if not self._shares_blocks:
            return lambda partial: own.attend(blocks if partial is None else (*blocks, partial))
        if self._shared is None or sublayer not in self._shared.queries:
            self._shared = self._share(sublayer)
        shared = self._shared

        def merge(partial: Tensor | None) -> Tensor:
            completed = shared.take(sublayer)
            if partial is None:
                return completed.o
            return depth_phase2(completed, partial, own.eps)

        return merge

    def read_fused(self, sublayer: int, norm: RMSNorm) -> Tensor | None:
        if self._shares_blocks:
            return None  # what the read needs is part of a shared one
        own: DepthQuery = self.readers[sublayer]
        sources = self.blocks if self.partial is None else [*self.blocks, self.partial]
        return own.attend_normed(sources, norm)

    @property
    def _shares_blocks(self) -> bool:
        return self.two_phase and len(self.blocks) > 1  # one block: nothing to share

    def _share(self, first: int) -> SharedReads:
        """Phase 1 for ``first`` and the later sublayers of its block."""
        block = self.plan.block_of(first)
        same = [i for i in self.readers if i >= first and self.plan.block_of(i) == block]
        pairs = {i: (self.readers[i].query, self.readers[i].norm) for i in same}
        return SharedReads(pairs, tuple(self.blocks), self.readers[first].eps)


class AttentionResiduals(Residual):
    """Every sublayer, and the output head, attends over the blocks so far."""

    def reader(self, sublayer: int, weights: Mapping[str, Tensor]) -> DepthQuery:
        eps = self.kind.section.norm_eps
        return DepthQuery(weights["proj.weight"].flatten(), weights["norm.weight"], eps)

    def stream(
        self, readers: Mapping[int, DepthQuery], blocks: Sequence[Tensor], partial: Tensor | None
    ) -> DepthStream:
        return DepthStream(self.plan, readers, blocks, partial, self.kind.section.two_phase)

    def end(self, reader: DepthQuery, blocks: Sequence[Tensor], partial: Tensor | None) -> Tensor:
        return reader.attend(blocks)

    def weights(
        self, sublayer: int, reader: DepthQuery, sources: Sequence[Tensor]
    ) -> Tensor | None:
        return depth_weights(reader.query, reader.norm, sources, reader.eps)

    def query(self, reader: DepthQuery) -> Tensor | None:
        return reader.query
