"""Hyper-connections in place of the residual sum: mHC-lite (arXiv 2601.05732), which the paper of
Attention Residuals compares with.

Shapes: B samples, T tokens, D hidden size, m streams. The stream of a micro-batch is [B, T, m*D].

A sublayer f reads a mixture of the m streams x [m, D] and writes to all of them, per token:

    x <- H_res x + h_post f(h_pre x)
    h_pre = sigmoid(.) [m],  h_post = 2 sigmoid(.) [m],  H_res = sum_k softmax(.)_k P_k [m, m]

where (.) is ``scale * W x~ + bias`` with its own scale, W and bias each time, x~ all streams as one
vector of m*D numbers of RMS 1, and P_k the m! permutation matrices. H_res is doubly stochastic by
construction; manifold-constrained hyper-connections (arXiv 2512.24880) come close to that by
Sinkhorn iterations. The streams start as copies of the embedding and end as their sum. The norm of
x~ has no weight: W would absorb it.

The streams are the running state, so they cross a pipeline boundary as a partial of m*D numbers a
token, m times what the standard residual sends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import permutations
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnres_train.model.blocks import Blocks
from attnres_train.model.residual.stream import Residual, ResidualStream, present


class Gates(NamedTuple):
    """The maps of one sublayer: W [2m + m!, m*D] and bias [2m + m!] of h_pre, h_post and H_res, and
    their three scales."""

    weight: Tensor
    bias: Tensor
    scales: Tensor
    eps: float

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Streams [B, T, m, D] -> h_pre [B, T, m], h_post [B, T, m] and H_res [B, T, m, m] in fp32
        (fp64). Of its work the input alone is kept for the backward pass."""
        return checkpoint(self._maps, x, use_reentrant=False, preserve_rng_state=False)

    def _maps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        streams, wide = x.shape[-2], torch.promote_types(x.dtype, torch.float32)
        orders = torch.tensor([*permutations(range(streams))], device=x.device)
        sizes = (streams, streams, len(orders))
        with torch.autocast(x.device.type, enabled=False):
            normed = F.rms_norm(x.to(wide).flatten(-2), (x[0, 0].numel(),), eps=self.eps)
            products = F.linear(normed, self.weight.to(wide)).split(sizes, -1)
            biases, scales = self.bias.to(wide).split(sizes), self.scales.to(wide)
            pre, post, res = (s * p + b for s, p, b in zip(scales, products, biases, strict=True))
            shuffles = F.one_hot(orders).to(wide).flatten(1)
            mixing = (res.softmax(-1) @ shuffles).unflatten(-1, (streams, streams))
            return pre.sigmoid(), 2 * post.sigmoid(), mixing


class HyperStream(ResidualStream):
    """m streams; the maps of a sublayer's read are kept for its `write`."""

    def __init__(
        self,
        plan: Blocks,
        readers: Mapping[int, Gates],
        blocks: Sequence[Tensor],
        partial: Tensor | None,
        streams: int,
    ) -> None:
        super().__init__(plan, readers, blocks, partial)
        self._streams = streams
        self._maps: tuple[Tensor, Tensor] | None = None

    def reader(self, sublayer: int) -> Callable[[Tensor | None], Tensor]:
        gates: Gates = self.readers[sublayer]
        streams = self._streams
        pre, post, mixing = gates(_apart(present(self.partial), streams))
        self._maps = post, mixing

        def read(partial: Tensor | None) -> Tensor:
            return _mixed(pre.unsqueeze(-2), _apart(present(partial), streams)).squeeze(-2)

        return read

    def write(self, sublayer: int, output: Tensor) -> None:
        assert self._maps is not None
        post, mixing = self._maps
        written = (post.unsqueeze(-1) * output.unsqueeze(-2)).to(self.dtype)
        streams = _apart(present(self.partial), self._streams)
        self.partial = (_mixed(mixing, streams) + written).flatten(-2)


def _apart(streams: Tensor, count: int) -> Tensor:
    """[B, T, m*D] -> [B, T, m, D]."""
    return streams.unflatten(-1, (count, -1))


def _mixed(weights: Tensor, x: Tensor) -> Tensor:
    """``weights`` [B, T, n, m] times streams [B, T, m, D], in the dtype of the streams."""
    with torch.autocast(x.device.type, enabled=False):
        return (weights @ x.to(weights.dtype)).to(x.dtype)


class HyperConnections(Residual):
    """``kind: mhc_lite``: `Residual` with `num_streams` streams."""

    @property
    def _streams(self) -> int:
        return self.kind.section.num_streams

    def reader(self, sublayer: int, weights: Mapping[str, Tensor]) -> Gates | None:
        if not weights:
            return None  # the head reads the sum of all streams
        gates = weights["gates.weight"], weights["gates.bias"], weights["gate_scales"]
        return Gates(*gates, self.kind.section.norm_eps)

    def start(self, embedding: Tensor) -> tuple[list[Tensor], Tensor | None]:
        return [], embedding.repeat(1, 1, self._streams)

    def stream(
        self, readers: Mapping[int, Gates], blocks: Sequence[Tensor], partial: Tensor | None
    ) -> HyperStream:
        return HyperStream(self.plan, readers, blocks, partial, self._streams)

    def end(self, reader: None, blocks: Sequence[Tensor], partial: Tensor | None) -> Tensor:
        return present(partial).unflatten(-1, (self._streams, -1)).sum(-2)
