"""The residual stream of a run of sublayers: what each sublayer reads and where its output goes.

Shapes: D hidden size; every tensor of the stream is [B, T, D]. Sublayers are counted from 1; see
`Blocks` for blocks and partial.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from attnres_train.model.blocks import Blocks
from attnres_train.model.depth_attention import (
    Phase1,
    depth_attention,
    depth_phase1,
    depth_phase2,
)
from attnres_train.model.norm import RMSNorm


class DepthQuery(NamedTuple):
    """Pseudo-query [D] and key-norm weight [D] of one depth read."""

    query: Tensor
    norm: Tensor
    eps: float

    @classmethod
    def of(cls, proj: nn.Linear, norm: RMSNorm) -> DepthQuery:
        """From the released ``*_res_proj.weight`` [1, D] and ``*_res_norm.weight`` [D]."""
        return cls(proj.weight[0], norm.weight, norm.eps)

    def attend(self, sources: Sequence[Tensor]) -> Tensor:
        """Attention over depth (arXiv 2603.15031, Eq. 6); over one source it is the identity."""
        if len(sources) == 1:
            return sources[0]
        return depth_attention(self.query, self.norm, sources, self.eps)


class ResidualStream:
    """The stream as one micro-batch runs through consecutive sublayers.

    Standard residual: `read` gives the running sum, `write` adds to it. Attention Residuals:
    `read` attends over the finished blocks and the partial, `write` adds to the partial and
    closes it where a block ends. Tensors passed in are never modified, nor is the list that holds
    them.

    With ``two_phase`` the finished blocks are read once for all of ``queries`` that see the same
    ones (Alg. 1, phase 1), and every read merges the partial into its share (phase 2).
    """

    def __init__(
        self,
        plan: Blocks,
        queries: Mapping[int, DepthQuery],
        blocks: Sequence[Tensor],
        partial: Tensor | None,
        two_phase: bool,
    ) -> None:
        self.plan = plan
        self.queries = queries
        self.blocks = list(blocks)
        self.partial = partial
        self.two_phase = two_phase
        self.dtype = (partial if partial is not None else self.blocks[0]).dtype
        self._prepared: dict[int, Phase1] = {}

    def read(self, sublayer: int) -> Tensor:
        """The input of ``sublayer``, before its own norm."""
        if not self.plan.has_blocks:
            return self.partial
        own = self.queries[sublayer]
        if not self.two_phase or len(self.blocks) == 1:  # one block: nothing to share
            return own.attend(self.blocks if self.partial is None else [*self.blocks, self.partial])
        if sublayer not in self._prepared:
            self._prepared = self._read_blocks(sublayer)
        completed = self._prepared.pop(sublayer)
        if self.partial is None:
            return completed.o
        return depth_phase2(completed, own.query, own.norm, self.partial, own.eps)

    def write(self, sublayer: int, output: Tensor) -> None:
        """Add the output of ``sublayer``, in the dtype of the stream."""
        output = output.to(self.dtype)
        self.partial = output if self.partial is None else self.partial + output
        if self.plan.closes(sublayer):
            self.blocks.append(self.partial)
            self.partial = None

    def _read_blocks(self, first: int) -> dict[int, Phase1]:
        """Phase 1 for ``first`` and the later sublayers of its block."""
        block = self.plan.block_of(first)
        same = [i for i in self.queries if i >= first and self.plan.block_of(i) == block]
        pairs = [(self.queries[i].query, self.queries[i].norm) for i in same]
        eps = self.queries[first].eps
        return dict(zip(same, depth_phase1(pairs, self.blocks, eps), strict=True))
