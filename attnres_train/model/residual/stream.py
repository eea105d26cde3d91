"""The residual stream of a run of sublayers: what each sublayer reads and where its output goes.

Here is the standard residual, one running sum, and what every other residual builds on: those of
the package are in `attention_residuals`, `variants`, `dense_former` and `hyper_connections`.

Shapes: every tensor of the stream is [B, T, D], D the hidden size (`ResidualKind.stream_size` where
that is another). Sublayers are counted from 1; see `Blocks` for blocks and partial.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnres_train.config.model_schema import ModelConfig
from attnres_train.model.blocks import Blocks
from attnres_train.model.norm import RMSNorm
from attnres_train.model.residual.kind import ResidualKind, residual_kind

Readers = Mapping[int, Any]
"""What a residual makes of the parameters of its reads, by sublayer: its own stream alone looks
into them. A read that learns nothing has none."""


class ResidualStream:
    """The stream as one micro-batch runs through consecutive sublayers: the running sum.

    `read` gives the partial, `write` adds to it and, where the plan has blocks, closes it at the
    end of a block. Tensors passed in are never modified, nor is the list that holds them.
    """

    recompute = False
    """Whether backward passes rerun reads and the norms after them. Of what a sublayer reads only
    the partial is kept then, besides what the sublayer itself keeps."""

    def __init__(
        self, plan: Blocks, readers: Readers, blocks: Sequence[Tensor], partial: Tensor | None
    ) -> None:
        self.plan = plan
        self.readers = readers
        self.blocks = list(blocks)
        self.partial = partial
        self.dtype = (partial if partial is not None else self.blocks[0]).dtype

    @property
    def source(self) -> Tensor | None:
        """The open block [B, T, D] as a read mixes it."""
        return self.partial

    def read(self, sublayer: int) -> Tensor:
        """The input of ``sublayer``, before its own norm."""
        return self.reader(sublayer)(self.partial)

    def read_normed(self, sublayer: int, norm: RMSNorm) -> Tensor:
        """The input of ``sublayer`` after its own ``norm``, in the dtype of the parameters."""
        fused = self.read_fused(sublayer, norm)
        if fused is not None:
            return norm.gated(fused.to(norm.weight.dtype))
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
        return present

    def read_fused(self, sublayer: int, norm: RMSNorm) -> Tensor | None:
        """`read_normed` by one kernel, which keeps no more than ``recompute`` would; None where
        none applies."""
        return None

    def write(self, sublayer: int, output: Tensor) -> None:
        """Add the output of ``sublayer``, in the dtype of the stream."""
        output = output.to(self.dtype)
        self.partial = output if self.partial is None else self.partial + output
        if self.plan.closes(sublayer):
            self.blocks.append(self.partial)
            self.partial = None


def present(partial: Tensor | None) -> Tensor:
    """The partial, where there is one."""
    assert partial is not None, "a stream with blocks has no partial where a block begins or ends"
    return partial


class Residual:
    """How the stream of a `ResidualKind` starts, runs and ends: ``kind: standard``, and the base of
    the others. ``num_sublayers + 1`` is the read of the output head."""

    def __init__(self, kind: ResidualKind) -> None:
        self.kind, self.plan = kind, kind.plan

    def reader(self, sublayer: int, weights: Mapping[str, Tensor]) -> Any:
        """What the stream reads with before ``sublayer``, and `end` for the head: made in every
        pass of the ``weights`` named in `ResidualKind.learned`. None for nothing."""
        return None

    def start(self, embedding: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """Blocks and partial after the embedding [B, T, D]."""
        return ([embedding], None) if self.plan.has_blocks else ([], embedding)

    def stream(
        self, readers: Readers, blocks: Sequence[Tensor], partial: Tensor | None
    ) -> ResidualStream:
        """The stream through the sublayers of ``readers``."""
        return ResidualStream(self.plan, readers, blocks, partial)

    def end(self, reader: Any, blocks: Sequence[Tensor], partial: Tensor | None) -> Tensor:
        """What the output head reads, [B, T, D], before the final norm."""
        return present(partial)

    def weights(self, sublayer: int, reader: Any, sources: Sequence[Tensor]) -> Tensor | None:
        """For a picture, without gradient: the weights [B, T, N], fp32 (fp64), with which the read
        before ``sublayer`` (and `end`) mixes ``sources``, the blocks so far and the open one if
        there is one. None where it has no such weights."""
        return None

    def query(self, reader: Any) -> Tensor | None:
        """For a picture: what of a read's parameters chooses among sources; None for nothing."""
        return None


def build_residual(model: ModelConfig) -> Residual:
    """What runs the residual stream of ``model``."""
    kind = residual_kind(model)
    found = kind.implementation
    if isinstance(found, str):
        module, _, name = found.partition(":")
        found = getattr(importlib.import_module(module), name)
    residual: Residual = found(kind)
    return residual
