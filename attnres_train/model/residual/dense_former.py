"""DenseFormer (arXiv 2402.02622): after every decoder layer comes

    Y_i = sum_{j <= i} alpha_ij X_j,    X_{i+1} = layer(Y_i),    X_0 the embedding,

with learned scalars alpha, first the identity; dilation and period are 1. X_j are the blocks of a
block size of 2 sublayers.

Shapes: B samples, T tokens, D hidden size, N sources.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnres_train.model.residual.stream import Residual, ResidualStream, present


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
    """Blocks are the states after whole layers; a layer goes on from an average of all of them."""

    def reader(self, sublayer: int) -> Callable[[Tensor | None], Tensor]:
        if self.plan.opens(sublayer):
            average: DepthAverage | None = self.readers.get(sublayer)
            # The first layer has the embedding alone.
            self.partial = self.blocks[0] if average is None else average.attend(self.blocks)
        return present


class DenseFormer(Residual):
    """``kind: dense_former``."""

    def reader(self, sublayer: int, weights: Mapping[str, Tensor]) -> DepthAverage | None:
        return DepthAverage(weights["weights"]) if weights else None

    def stream(
        self, readers: Mapping[int, DepthAverage], blocks: Sequence[Tensor], partial: Tensor | None
    ) -> DenseStream:
        return DenseStream(self.plan, readers, blocks, partial)

    def end(self, reader: DepthAverage, blocks: Sequence[Tensor], partial: Tensor | None) -> Tensor:
        return reader.attend(blocks)

    def weights(
        self, sublayer: int, reader: DepthAverage | None, sources: Sequence[Tensor]
    ) -> Tensor | None:
        if reader is None:
            return None  # in the middle of a layer, and before the first
        wide = torch.promote_types(sources[0].dtype, torch.float32)
        return reader.weights.to(wide).expand(*sources[0].shape[:-1], -1)

    def query(self, reader: DepthAverage | None) -> Tensor | None:
        return reader.weights if reader else None
