"""Stage: one rank of a pipeline, with the chunks that it computes and its way to the others.

Shapes: B samples of a micro-batch, T tokens, S those of them in the stream here, D hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from attnres_train.pipeline.plan.messages import Message
from attnres_train.pipeline.plan.transport_plan import TransportPlan
from attnres_train.pipeline.run.transport import Transport


class Batch(Protocol):
    """What the engine has to know of a micro-batch; everything else is between data and chunks."""

    @property
    def tokens(self) -> Tensor:
        """[B, T]."""


class ChunkOutput(Protocol):
    """What a chunk makes of one micro-batch; tensors are [B, S, D]."""

    blocks: dict[int, Tensor]
    """The blocks that it completes."""
    partial: Tensor | None
    """The open block after it."""
    loss: Tensor | None
    """Last chunk: the micro-batch's mean loss, a scalar; in an evaluation also several, [G]."""


OnBlock = Callable[[int, Tensor], None]
"""Told of each block as it is complete, in ascending order."""
Chunk = Callable[[Any, dict[int, Tensor], Tensor | None, OnBlock], ChunkOutput]
"""(a `Batch` of the chunk's own kind, blocks complete before the chunk, partial, whom to tell of
new blocks) -> output. To tell is optional: it lets blocks leave before the pass is over."""


@dataclass(frozen=True)
class Stage:
    """One rank of a pipeline: its chunks by index, and what they send where and as what."""

    chunks: Mapping[int, Chunk]
    plan: TransportPlan
    rank: int
    transport: Transport
    hidden_size: int
    stream_dtype: torch.dtype
    device: torch.device | str
    debug: bool
    """Whether each tensor's identity travels beside it."""
    on_pass: Callable[[], None] = lambda: None
    """Called before every pass: whoever watches over the process knows that it gets on."""
    share: Callable[[int], range] = range
    """T -> which of a sample's tokens are in the stream of this rank, S of them."""

    def buffer(self, batch: Batch, message: Message) -> Tensor:
        """Room for the tensor [B, S, D] of ``message`` for micro-batch ``batch``, not initialised;
        a partial may be several D wide (`Blocks.partial_units`)."""
        samples, length = batch.tokens.shape
        units = self.plan.layout.blocks.partial_units if message.block is None else 1
        shape = samples, len(self.share(length)), units * self.hidden_size
        return torch.empty(shape, dtype=self.stream_dtype, device=self.device)
