"""The residual stream of a run of sublayers: what each sublayer reads and where its output goes.

Here are the standard residual and Attention Residuals as the paper trains them; the residuals it
compares with are in `variants` and `hyper_connections`.

Shapes: D hidden size; every tensor of the stream is [B, T, D]. Sublayers are counted from 1; see
`Blocks` for blocks and partial.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attnres_train.config.model_schema import ModelConfig
from attnres_train.model.blocks import Blocks
from attnres_train.model.depth.attention import depth_attention, depth_phase2
from attnres_train.model.depth.fla import normed_read_kernel, run_normed_read
from attnres_train.model.depth.shared_reads import SharedReads
from attnres_train.model.norm import RMSNorm


class DepthQuery(NamedTuple):
    """Pseudo-query [D] and key-norm weight [D] of one depth read."""

    query: Tensor
    norm: Tensor
    eps: float

    @classmethod
    def of(cls, proj: nn.Linear, norm: RMSNorm) -> DepthQuery:
        """From the released ``*_res_proj.weight`` [1, D] and ``*_res_norm.weight`` [D]."""
        return cls(proj.weight.flatten(), norm.weight, norm.eps)

    def attend(self, sources: Sequence[Tensor]) -> Tensor:
        """Attention over depth (arXiv 2603.15031, Eq. 6); over one source it is the identity."""
        if len(sources) == 1:
            return sources[0]
        return depth_attention(self.query, self.norm, sources, self.eps)

    def attend_normed(self, sources: Sequence[Tensor], norm: RMSNorm) -> Tensor | None:
        """`attend` and ``norm`` behind it by one kernel of fla's; None where it does not apply."""
        kernel = normed_read_kernel(sources, self.eps, norm.eps)
        if kernel is None:
            return None
        return run_normed_read(kernel, self.query, self.norm, sources, norm.weight, self.eps)


class ResidualStream:
    """The stream as one micro-batch runs through consecutive sublayers.

    Standard residual: `read` gives the running sum, `write` adds to it. Attention Residuals:
    `read` attends over the finished blocks and the partial, `write` adds to the partial and
    closes it where a block ends. Tensors passed in are never modified, nor is the list that holds
    them.

    With ``two_phase`` the finished blocks are read once for all of ``queries`` that see the same
    ones (Alg. 1, phase 1), and every read merges the partial into its share (phase 2).
    """

    recompute = False
    """Whether backward passes rerun reads and the norms behind them. Of what a sublayer reads only
    the partial is kept then, besides what the sublayer itself keeps."""

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
        self._shared: SharedReads | None = None

    def read(self, sublayer: int) -> Tensor:
        """The input of ``sublayer``, before its own norm."""
        return self.reader(sublayer)(self.partial)

    def read_normed(self, sublayer: int, norm: RMSNorm) -> Tensor:
        """The input of ``sublayer`` behind its own ``norm``, in the dtype of the parameters."""
        fused = self._read_fused(sublayer, norm)
        if fused is not None:
            return fused.to(norm.weight.dtype)
        if not (self.recompute and torch.is_grad_enabled()):
            return norm(self.read(sublayer)).to(norm.weight.dtype)
        read = self.reader(sublayer)

        def normed(partial: Tensor | None) -> Tensor:
            return norm(read(partial)).to(norm.weight.dtype)

        return checkpoint(normed, self.partial, use_reentrant=False, preserve_rng_state=False)

    def reader(self, sublayer: int) -> Callable[[Tensor | None], Tensor]:
        """Makes the input of ``sublayer`` from the partial, and may be called again to recompute
        it. It holds the blocks of now, not the stream: blocks to come hang on its result, and would
        close a cycle that keeps the graph alive."""
        if not self.plan.has_blocks:
            return lambda partial: partial
        own, blocks = self.queries[sublayer], tuple(self.blocks)
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

    def write(self, sublayer: int, output: Tensor) -> None:
        """Add the output of ``sublayer``, in the dtype of the stream."""
        output = output.to(self.dtype)
        self.partial = output if self.partial is None else self.partial + output
        if self.plan.closes(sublayer):
            self.blocks.append(self.partial)
            self.partial = None

    @property
    def _shares_blocks(self) -> bool:
        return self.two_phase and len(self.blocks) > 1  # one block: nothing to share

    def _read_fused(self, sublayer: int, norm: RMSNorm) -> Tensor | None:
        """Read and norm in one kernel, which keeps no more than `recompute` would; None where the
        read is part of a shared one, or no kernel applies."""
        own = self.queries.get(sublayer)
        if self._shares_blocks or not isinstance(own, DepthQuery):
            return None
        sources = self.blocks if self.partial is None else [*self.blocks, self.partial]
        return own.attend_normed(sources, norm)

    def _share(self, first: int) -> SharedReads:
        """Phase 1 for ``first`` and the later sublayers of its block."""
        block = self.plan.block_of(first)
        same = [i for i in self.queries if i >= first and self.plan.block_of(i) == block]
        pairs = {i: (self.queries[i].query, self.queries[i].norm) for i in same}
        return SharedReads(pairs, tuple(self.blocks), self.queries[first].eps)


Learned = dict[str, nn.Module | nn.Parameter]
"""Modules and parameters by the attribute name that they get."""


class Residual:
    """What the residual of a model decides: what is learned for it, and how its stream starts, runs
    and ends. This one is ``kind: standard``, ``full`` and ``block``.

    Every read has a ``prefix``, which begins the names of its parameters, and a ``sublayer``:
    num_sublayers + 1 is the read of the output head.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.config, self.options = config, config.residual
        self.plan = Blocks(config.num_sublayers, config.block_size)

    def learned(self, prefix: str, sublayer: int) -> Learned:
        """Parameters of the read before ``sublayer``, uninitialised."""
        if not self.plan.has_blocks:
            return {}
        hidden = self.config.hidden_size
        return {
            f"{prefix}_proj": nn.Linear(hidden, 1, bias=False),
            f"{prefix}_norm": RMSNorm(hidden, self.options.norm_eps),
        }

    def reader(self, owner: nn.Module, prefix: str) -> Any:
        """The read whose parameters ``owner`` has; None for one that learns nothing."""
        if not self.plan.has_blocks:
            return None
        return DepthQuery.of(getattr(owner, f"{prefix}_proj"), getattr(owner, f"{prefix}_norm"))

    def start(self, embedding: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """Blocks and partial behind the embedding [B, T, D]."""
        return ([embedding], None) if self.plan.has_blocks else ([], embedding)

    def stream(
        self, readers: Mapping[int, Any], blocks: Sequence[Tensor], partial: Tensor | None
    ) -> ResidualStream:
        """The stream through the sublayers of ``readers``."""
        return ResidualStream(self.plan, readers, blocks, partial, self.options.two_phase)

    def end(self, reader: Any, blocks: Sequence[Tensor], partial: Tensor | None) -> Tensor:
        """What the output head reads, [B, T, D], before the final norm."""
        return reader.attend(blocks) if self.plan.has_blocks else partial

    def flops(self, sublayer: int) -> float:
        """Forward FLOPs per token of the read before ``sublayer``: square sum, logit and weighted
        sum of every source."""
        if not self.plan.has_blocks:
            return 0
        return 6 * self.config.hidden_size * self.plan.num_sources(sublayer)
