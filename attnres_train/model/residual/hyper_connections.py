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

import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import permutations
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attnres_train.model.residual.stream import Learned, Residual, ResidualStream


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

    def __init__(self, *args, streams: int) -> None:
        super().__init__(*args)
        self._streams = streams
        self._maps: tuple[Tensor, Tensor] | None = None

    def reader(self, sublayer: int) -> Callable[[Tensor], Tensor]:
        streams = self._streams
        pre, *self._maps = self.queries[sublayer](_apart(self.partial, streams))
        return lambda partial: _mixed(pre.unsqueeze(-2), _apart(partial, streams)).squeeze(-2)

    def write(self, sublayer: int, output: Tensor) -> None:
        post, mixing = self._maps
        written = (post.unsqueeze(-1) * output.unsqueeze(-2)).to(self.dtype)
        self.partial = (_mixed(mixing, _apart(self.partial, self._streams)) + written).flatten(-2)


def _apart(streams: Tensor, count: int) -> Tensor:
    """[B, T, m*D] -> [B, T, m, D]."""
    return streams.unflatten(-1, (count, -1))


def _mixed(weights: Tensor, x: Tensor) -> Tensor:
    """``weights`` [B, T, n, m] times streams [B, T, m, D], in the dtype of the streams."""
    with torch.autocast(x.device.type, enabled=False):
        return (weights @ x.to(weights.dtype)).to(x.dtype)


class HyperConnections(Residual):
    """``kind: mhc_lite``: `Residual` with `num_streams` streams."""

    def learned(self, prefix: str, sublayer: int) -> Learned:
        if sublayer > self.plan.num_sublayers:
            return {}
        streams, wide = self.options.num_streams, self.config.stream_size
        gates = nn.Linear(wide, 2 * streams + math.factorial(streams))
        return {f"{prefix}_gates": gates, f"{prefix}_gate_scales": nn.Parameter(torch.empty(3))}

    def reader(self, owner: nn.Module, prefix: str) -> Gates | None:
        gates = getattr(owner, f"{prefix}_gates", None)
        if gates is None:
            return None
        scales = getattr(owner, f"{prefix}_gate_scales")
        return Gates(gates.weight, gates.bias, scales, self.options.norm_eps)

    def start(self, embedding: Tensor) -> tuple[list[Tensor], Tensor | None]:
        return [], embedding.repeat(1, 1, self.options.num_streams)

    def stream(
        self, readers: Mapping[int, Gates], blocks: Sequence[Tensor], partial: Tensor | None
    ) -> HyperStream:
        streams = self.options.num_streams
        return HyperStream(self.plan, readers, blocks, partial, False, streams=streams)

    def end(self, reader: None, blocks: Sequence[Tensor], partial: Tensor | None) -> Tensor:
        return partial.unflatten(-1, (self.options.num_streams, -1)).sum(-2)

    def flops(self, sublayer: int) -> float:
        """Logits, read, mixing and write; for the output the sum alone."""
        streams, wide = self.options.num_streams, self.config.stream_size
        if sublayer > self.plan.num_sublayers:
            return wide
        return 2 * wide * (2 * streams + math.factorial(streams) + 1 + streams + 1)


def init_gates_(value: Tensor, name: str, streams: int) -> Tensor:
    """Fill ``*_res_gates.weight``, ``.bias`` or ``*_res_gate_scales`` in place, named ``name``.

    W is 0 and scales are 0.01. By its bias a sublayer reads and writes one stream, another than the
    sublayer before, more than the rest (1 against -1), and H_res is nearly the identity (0 for
    that permutation, -8 for the others).
    """
    if name.endswith("_scales"):
        return value.fill_(0.01)
    value.zero_()
    if name.endswith(".bias"):
        layer, part = re.search(r"layers\.(\d+)\.(self_attention|mlp)_", name).groups()
        home = (2 * int(layer) + (part == "mlp")) % streams
        value[: 2 * streams] = -1
        value[[home, streams + home]] = 1
        value[2 * streams + 1 :] = -8  # `permutations` yields the identity first
    return value
