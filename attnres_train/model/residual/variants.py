"""Other ways to mix earlier representations: the variants of depth attention in Table 4 of arXiv
2603.15031, and DenseFormer.

Shapes: B samples, T tokens, D hidden size, N sources, H heads of K = D / H channels.

Plain formulas by autograd, for comparisons; a read keeps its sources and is computed again in the
backward pass. Blocks cross a pipeline as they do without the options: a sliding window could do
with fewer than are sent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from attnres_train.config.model_schema import ModelConfig, ResidualConfig
from attnres_train.model.norm import RMSNorm
from attnres_train.model.residual.hyper_connections import HyperConnections
from attnres_train.model.residual.stream import Learned, Residual, ResidualStream


def residual_of(config: ModelConfig) -> Residual:
    """The residual that ``config`` asks for."""
    kinds = {"dense_former": DenseFormer, "mhc_lite": HyperConnections}
    attention = DepthVariants if config.residual.variations else Residual
    return kinds.get(config.residual.kind, attention)(config)


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
            logits_BTNH = self._logits(values_BTND)
            is_softmax = self.options.normalizer == "softmax"
            weights = logits_BTNH.softmax(-2) if is_softmax else logits_BTNH.sigmoid()
            heads_BTNHK = values_BTND.unflatten(-1, (self.options.num_heads, -1))
            mixed = (weights.unsqueeze(-1) * heads_BTNHK).sum(-3)
            return mixed.flatten(-2).to(sources[0].dtype)

    def _logits(self, values_BTND: Tensor) -> Tensor:
        """[B, T, N, H], or [N, H] where they do not depend on the input."""
        wide, shape, eps = values_BTND.dtype, values_BTND.shape[-1:], self.options.norm_eps
        if self.scores is not None:
            return self.scores.to(wide)
        keys = values_BTND
        if self.norm is not None:
            keys = self.norm.to(wide) * F.rms_norm(keys, shape, eps=eps)
        query = self.query.to(wide)
        if self.options.query == "input":
            query = F.linear(F.rms_norm(values_BTND[..., -1:, :], shape, eps=eps), query)
        return (query * keys).unflatten(-1, (self.options.num_heads, -1)).sum(-1)


class DepthVariants(Residual):
    """``kind: full`` and ``block`` with other options than the paper's choice.

    - ``window`` W: embedding and W latest sources, the partial counts as one; the output too.
    - ``query: input``: W_l x, x the latest source with RMS 1 (the paper: "the current hidden
      state", which in its pseudo-code is the partial), W_l [D, D] zero at first.
    - ``scores: bias``: learned scalars in place of query and key.
    - ``normalizer: sigmoid``: every weight for itself, also of a single source.
    - ``key_norm: false``: keys are the values.
    - ``num_heads``: each head has its own weights for its K channels; one norm over all.
    """

    def learned(self, prefix: str, sublayer: int) -> Learned:
        options, hidden = self.options, self.config.hidden_size
        if options.scores == "bias":
            scores = torch.empty(self._visible(sublayer), options.num_heads)
            return {f"{prefix}_scores": nn.Parameter(scores)}
        name, rows = ("query", hidden) if options.query == "input" else ("proj", 1)
        learned: Learned = {f"{prefix}_{name}": nn.Linear(hidden, rows, bias=False)}
        if options.key_norm:
            learned[f"{prefix}_norm"] = RMSNorm(hidden, options.norm_eps)
        return learned

    def reader(self, owner: nn.Module, prefix: str) -> VariantRead:
        def weight(name: str) -> Tensor | None:
            return getattr(getattr(owner, f"{prefix}_{name}", None), "weight", None)

        query = weight("query") if self.options.query == "input" else weight("proj")
        scores = getattr(owner, f"{prefix}_scores", None)
        return VariantRead(self.options, query, scores, weight("norm"))

    def stream(
        self, readers: Mapping[int, VariantRead], blocks: Sequence[Tensor], partial: Tensor | None
    ) -> ResidualStream:
        if self.options.window is not None:
            recent = self.options.window - (partial is not None)
            unread = blocks[1 : max(1, len(blocks) - recent)]
            blocks = [_WithoutUse.apply(blocks[0], *unread), *blocks[1:]]
        return ResidualStream(self.plan, readers, blocks, partial, two_phase=False)

    def flops(self, sublayer: int) -> float:
        options, hidden = self.options, self.config.hidden_size
        if options.scores == "bias":
            return 2 * hidden * self._visible(sublayer)
        projection = 2 * hidden**2 if options.query == "input" else 0
        return projection + (4 + 2 * options.key_norm) * hidden * self._visible(sublayer)

    def _visible(self, sublayer: int) -> int:
        sources, window = self.plan.num_sources(sublayer), self.options.window
        return sources if window is None else min(sources, 1 + window)


class _WithoutUse(Function):
    """The first tensor as it is; the others get a gradient of zero. The pipeline counts one
    gradient from every block that a chunk is given, also from those outside its windows."""

    @staticmethod
    def forward(ctx, first: Tensor, *others: Tensor) -> Tensor:
        ctx.count = len(others)
        return first.view_as(first)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros_like(grad) for _ in range(ctx.count))


class DepthAverage(NamedTuple):
    """Weights [N] of a depth-weighted average."""

    weights: Tensor

    def attend(self, sources: Sequence[Tensor]) -> Tensor:
        """``sum_n weights[n] * sources[n]``, [B, T, D]."""
        return checkpoint(self._mix, *sources, use_reentrant=False, preserve_rng_state=False)

    def _mix(self, *sources: Tensor) -> Tensor:
        wide = torch.promote_types(sources[0].dtype, torch.float32)
        mixed = (torch.stack(sources, -1).to(wide) * self.weights.to(wide)).sum(-1)
        return mixed.to(sources[0].dtype)


class DenseStream(ResidualStream):
    """Blocks are the states behind whole layers; a layer goes on from an average of all of them."""

    def reader(self, sublayer: int) -> Callable[[Tensor], Tensor]:
        if self.plan.opens(sublayer):
            average = self.queries.get(sublayer)  # the first layer has the embedding alone
            self.partial = self.blocks[0] if average is None else average.attend(self.blocks)
        return lambda partial: partial


class DenseFormer(Residual):
    """``kind: dense_former`` (arXiv 2402.02622): behind every decoder layer comes

        Y_i = sum_{j <= i} alpha_ij X_j,    X_{i+1} = layer(Y_i),    X_0 the embedding,

    with learned scalars alpha, first the identity; dilation and period are 1. X_j are the blocks of
    a block size of 2 sublayers.
    """

    def learned(self, prefix: str, sublayer: int) -> Learned:
        if not self._averages(sublayer):
            return {}
        weights = torch.empty(self.plan.num_sources(sublayer))
        return {f"{prefix}_weights": nn.Parameter(weights)}

    def reader(self, owner: nn.Module, prefix: str) -> DepthAverage | None:
        weights = getattr(owner, f"{prefix}_weights", None)
        return None if weights is None else DepthAverage(weights)

    def stream(
        self, readers: Mapping[int, DepthAverage], blocks: Sequence[Tensor], partial: Tensor | None
    ) -> DenseStream:
        return DenseStream(self.plan, readers, blocks, partial, two_phase=False)

    def flops(self, sublayer: int) -> float:
        sources = self.plan.num_sources(sublayer)
        return 2 * self.config.hidden_size * sources if self._averages(sublayer) else 0

    def _averages(self, sublayer: int) -> bool:
        return sublayer > 1 and self.plan.opens(sublayer)
