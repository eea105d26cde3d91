"""Attention Residuals with other options than the paper's choice: ``kind: full`` and ``block`` with
what Table 4 of arXiv 2603.15031 compares (see `kinds.Block`).

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
            values_BTND = torch.stack(sources, -2).to(wide)
            weights = self._weights(values_BTND)
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

    def _weights(self, values_BTND: Tensor) -> Tensor:
        """[B, T, N, H], or [N, H] where they do not depend on the input."""
        logits_BTNH = self._logits(values_BTND)
        is_softmax = self.options.normalizer == "softmax"
        return logits_BTNH.softmax(-2) if is_softmax else logits_BTNH.sigmoid()

    def _logits(self, values_BTND: Tensor) -> Tensor:
        """[B, T, N, H], or [N, H] where they do not depend on the input."""
        wide, shape, eps = values_BTND.dtype, values_BTND.shape[-1:], self.options.norm_eps
        if self.scores is not None:
            return self.scores.to(wide)
        keys = values_BTND
        if self.norm is not None:
            keys = self.norm.to(wide) * F.rms_norm(keys, shape, eps=eps)
        assert self.query is not None
        query = self.query.to(wide)
        if self.options.query == "input":
            query = F.linear(F.rms_norm(values_BTND[..., -1:, :], shape, eps=eps), query)
        return (query * keys).unflatten(-1, (self.options.num_heads, -1)).sum(-1)


class VariantStream(ResidualStream):
    """Every read is one of its own, over the finished blocks and the partial."""

    def reader(self, sublayer: int) -> Callable[[Tensor | None], Tensor]:
        own: VariantRead = self.readers[sublayer]
        blocks = tuple(self.blocks)
        return lambda partial: own.attend(blocks if partial is None else (*blocks, partial))


class DepthVariants(Residual):
    """Reads are `VariantRead`."""

    def reader(self, sublayer: int, weights: Mapping[str, Tensor]) -> VariantRead:
        query = weights.get("query.weight", weights.get("proj.weight"))
        scores, norm = weights.get("scores"), weights.get("norm.weight")
        return VariantRead(self.kind.section, query, scores, norm)

    def stream(
        self, readers: Mapping[int, VariantRead], blocks: Sequence[Tensor], partial: Tensor | None
    ) -> VariantStream:
        window = self.kind.section.window
        if window is not None:
            recent = window - (partial is not None)
            unread = blocks[1 : max(1, len(blocks) - recent)]
            blocks = [_WithoutUse.apply(blocks[0], *unread), *blocks[1:]]
        return VariantStream(self.plan, readers, blocks, partial)

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
