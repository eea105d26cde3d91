"""Attention Residuals with other options than the paper's choice: ``kind: full`` and ``block`` with
what Table 4 of arXiv 2603.15031 compares, and what came after it (see `kinds.Block`).

Shapes: B samples, T tokens, D hidden size, N sources, H heads of K = D / H channels.

Plain formulas by autograd, for comparisons; a read keeps its sources and is computed again in the
backward pass. Blocks cross a pipeline as they do without the options: a sliding window could do
with fewer than are sent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from attnres_train.config.model_schema import ResidualConfig
from attnres_train.model.blocks import Blocks
from attnres_train.model.residual.stream import Residual, ResidualStream


class VariantRead(NamedTuple):
    """One read with the ``options`` of a configuration; None is what they make needless.

    ``query`` is [D], or [D, D] for ``query: input``; ``scores`` [N, H], ``norm`` [D].
    """

    options: ResidualConfig
    query: Tensor | None
    scores: Tensor | None
    norm: Tensor | None

    def attend(self, sources: Sequence[Tensor]) -> Tensor:
        """The mixture [B, T, D] of ``sources`` [B, T, D], statistics in fp32 (fp64)."""
        if self.options.window is not None:
            sources = [sources[0], *sources[1:][-self.options.window :]]
        return checkpoint(self._mix, *sources, use_reentrant=False, preserve_rng_state=False)

    def _mix(self, *sources: Tensor) -> Tensor:
        with torch.autocast(sources[0].device.type, enabled=False):
            wide = torch.promote_types(sources[0].dtype, torch.float32)
            sources_BTND = torch.stack(sources, -2).to(wide)
            weights = self._weights(sources_BTND)
            takes_keys = self.options.values == "key"
            values_BTND = self._keys(sources_BTND) if takes_keys else sources_BTND
            heads_BTNHK = values_BTND.unflatten(-1, (self.options.num_heads, -1))
            mixed = (weights.unsqueeze(-1) * heads_BTNHK).sum(-3)
            return mixed.flatten(-2).to(sources[0].dtype)

    @torch.no_grad()
    def weights(self, sources: Sequence[Tensor]) -> Tensor:
        """The weights [B, T, N] of `attend`, the mean over heads; zero outside of the window."""
        window, count = self.options.window, len(sources)
        seen = range(count) if window is None else [0, *range(1, count)[-window:]]
        wide = torch.promote_types(sources[0].dtype, torch.float32)
        weights_BTnH = self._weights(torch.stack([sources[n] for n in seen], -2).to(wide))
        weights = sources[0].new_zeros((*sources[0].shape[:-1], count), dtype=wide)
        weights[..., list(seen)] = weights_BTnH.mean(-1).expand(*weights.shape[:-1], len(seen))
        return weights

    def _weights(self, sources_BTND: Tensor) -> Tensor:
        """[B, T, N, H], or [N, H] where they do not depend on the input."""
        logits_BTNH = self._logits(sources_BTND)
        is_softmax = self.options.normalizer == "softmax"
        return logits_BTNH.softmax(-2) if is_softmax else logits_BTNH.sigmoid()

    def _logits(self, sources_BTND: Tensor) -> Tensor:
        """[B, T, N, H], or [N, H] where they do not depend on the input."""
        wide = sources_BTND.dtype
        if self.scores is not None:
            return self.scores.to(wide)
        assert self.query is not None
        query = self.query.to(wide)
        if self.options.query == "input":
            query = F.linear(unit_rms(sources_BTND[..., -1:, :], self.options.norm_eps), query)
        products_BTND = query * self._keys(sources_BTND)
        return products_BTND.unflatten(-1, (self.options.num_heads, -1)).sum(-1)

    def _keys(self, sources_BTND: Tensor) -> Tensor:
        if self.norm is None:
            return sources_BTND
        return self.norm.to(sources_BTND.dtype) * unit_rms(sources_BTND, self.options.norm_eps)


def unit_rms(x: Tensor, eps: float) -> Tensor:
    """``x / rms(x)`` over the last dimension, statistics in fp32 (fp64)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.rms_norm(wide, wide.shape[-1:], eps=eps).to(x.dtype)


class VariantStream(ResidualStream):
    """Every read is one of its own, over the finished blocks and the partial."""

    def reader(self, sublayer: int) -> Callable[[Tensor | None], Tensor]:
        own: VariantRead = self.readers[sublayer]
        blocks = tuple(self.blocks)
        return lambda partial: own.attend(blocks if partial is None else (*blocks, partial))


class UnitSumStream(VariantStream):
    """``block_sum: unit_outputs``: a partial is [B, T, 2 D], the sum of the outputs and that of the
    outputs with RMS 1. Reads see the first, the block is the second."""

    def __init__(
        self,
        plan: Blocks,
        readers: Mapping[int, VariantRead],
        blocks: Sequence[Tensor],
        partial: Tensor | None,
        eps: float,
    ) -> None:
        super().__init__(plan, readers, blocks, partial)
        self._eps = eps

    @property
    def source(self) -> Tensor | None:
        return None if self.partial is None else _halves(self.partial)[0]

    def reader(self, sublayer: int) -> Callable[[Tensor | None], Tensor]:
        read = super().reader(sublayer)
        return lambda partial: read(None if partial is None else _halves(partial)[0])

    def write(self, sublayer: int, output: Tensor) -> None:
        output = output.to(self.dtype)
        both = torch.cat([output, unit_rms(output, self._eps)], -1)
        self.partial = both if self.partial is None else self.partial + both
        if self.plan.closes(sublayer):
            # A tensor of its own: as a view it would keep the other sum, too.
            self.blocks.append(_halves(self.partial)[1].contiguous())
            self.partial = None


def _halves(partial: Tensor) -> tuple[Tensor, Tensor]:
    first, second = partial.chunk(2, -1)
    return first, second


class DepthVariants(Residual):
    """Reads are `VariantRead`."""

    def reader(self, sublayer: int, weights: Mapping[str, Tensor]) -> VariantRead:
        query = weights.get("query.weight", weights.get("proj.weight"))
        scores, norm = weights.get("scores"), weights.get("norm.weight")
        return VariantRead(self.kind.section, query, scores, norm)

    def stream(
        self, readers: Mapping[int, VariantRead], blocks: Sequence[Tensor], partial: Tensor | None
    ) -> VariantStream:
        options = self.kind.section
        window = options.window
        if window is not None:
            recent = window - (partial is not None)
            unread = blocks[1 : max(1, len(blocks) - recent)]
            blocks = [_WithoutUse.apply(blocks[0], *unread), *blocks[1:]]
        if options.block_sum == "outputs":
            return VariantStream(self.plan, readers, blocks, partial)
        return UnitSumStream(self.plan, readers, blocks, partial, options.norm_eps)

    def end(self, reader: VariantRead, blocks: Sequence[Tensor], partial: Tensor | None) -> Tensor:
        return reader.attend(blocks)

    def weights(
        self, sublayer: int, reader: VariantRead, sources: Sequence[Tensor]
    ) -> Tensor | None:
        return reader.weights(sources)

    def query(self, reader: VariantRead) -> Tensor | None:
        return reader.scores if reader.query is None else reader.query


class _Count(Protocol):
    count: int


class _WithoutUse(Function):
    """The first tensor as it is; the others get a gradient of zero. The pipeline counts one
    gradient from every block that a chunk is given, also from those outside its windows."""

    @staticmethod
    def forward(ctx: _Count, first: Tensor, *others: Tensor) -> Tensor:
        ctx.count = len(others)
        return first.view_as(first)

    @staticmethod
    def backward(ctx: _Count, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros_like(grad) for _ in range(ctx.count))
