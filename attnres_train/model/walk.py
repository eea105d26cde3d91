"""Decoder layers one after the other through the residual stream, and what of them the backward
pass runs again.

Shapes: B samples, S their tokens in the stream here, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnres_train.model.batch import MicroBatch
from attnres_train.model.layer import DecoderLayer
from attnres_train.model.ports import Past
from attnres_train.model.probe import Probe, ProbedStream
from attnres_train.model.residual.stream import Residual, ResidualStream

OnBlock = Callable[[int, Tensor], None]
"""Takes the number of a block and the block, [B, S, D]."""
Pasts = Mapping[int, Past]
"""What each layer goes on from, by its index."""
NO_PASTS: Pasts = MappingProxyType({})


class Walk:
    """Runs layers on the stream of ``residual``. ``recompute`` is `train.recompute`: with ``full``
    each layer keeps its inputs only and is rerun in the backward pass, with ``selective`` what is
    read from the stream, and the norm after it."""

    def __init__(self, residual: Residual, recompute: str) -> None:
        self.residual, self.recompute = residual, recompute

    def __call__(
        self,
        layers: Sequence[DecoderLayer],
        blocks: Sequence[Tensor],
        partial: Tensor | None,
        batch: MicroBatch,
        on_block: OnBlock | None = None,
        pasts: Pasts = NO_PASTS,
    ) -> tuple[list[Tensor], Tensor | None]:
        """All blocks complete after ``layers``, and the open one. In a training forward (training
        mode, gradients on) the tokens of every routed expert are counted."""
        sources, again = list(blocks), self.recompute == "full"
        for segment in [[layer] for layer in layers] if again else [layers]:
            args = (segment, sources, partial, batch.cu_seqlens, batch.probe)
            known = len(sources)
            if again and torch.is_grad_enabled():
                walk = checkpoint(self._run, *args, use_reentrant=False, preserve_rng_state=False)
                sources, partial, loads = walk
                tell(on_block, sources, known)
            else:
                sources, partial, loads = self._run(*args, on_block, pasts)
            _count(segment, loads)
        return sources, partial

    def _run(
        self,
        layers: Sequence[DecoderLayer],
        blocks: Sequence[Tensor],
        partial: Tensor | None,
        cu_seqlens: Tensor | None,
        probe: Probe | None = None,
        on_block: OnBlock | None = None,
        pasts: Pasts = NO_PASTS,
    ) -> tuple[list[Tensor], Tensor | None, list[Tensor | None]]:
        """All blocks after ``layers``, which share phase 1, the partial, and the layers' router
        loads. Free of side effects but for ``on_block`` and ``probe``, so that it can be rerun."""
        readers = {k: v for layer in layers for k, v in layer.depth_readers().items()}
        own = self.residual.stream(readers, blocks, partial)
        own.recompute = self.recompute == "selective"
        stream: ResidualStream | ProbedStream = own
        if probe is not None:
            stream = ProbedStream(own, self.residual, probe)
        loads = []
        for layer in layers:
            known = len(stream.blocks)
            loads.append(layer(stream, cu_seqlens, pasts.get(layer.index)))
            tell(on_block, stream.blocks, known)
        return stream.blocks, stream.partial, loads


def tell(on_block: OnBlock | None, blocks: Sequence[Tensor], known: int) -> None:
    """Hand on every block from number ``known``."""
    if on_block:
        for number in range(known, len(blocks)):
            on_block(number, blocks[number])


def _count(layers: Sequence[DecoderLayer], loads: Sequence[Tensor | None]) -> None:
    for layer, load in zip(layers, loads, strict=True):
        if load is not None and layer.training and torch.is_grad_enabled():
            layer.block_sparse_moe.gate.tokens_per_expert += load
