"""Text from a model that is spread over ranks: pipeline stages, shared experts, replicas.

The main rank has the texts. What it asks of the model it tells all other ranks, which do the same
passes with their layers; each keeps the pasts of those. Ranks that share the tokens of a sample
cannot: there is one at a time.

Shapes: B texts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from attnres_train.inference.decoding import CachedDecoder, Decoder
from attnres_train.model.batch import MicroBatch
from attnres_train.model.chunk import ChunkOutput, ModelChunk, OnBlock, Pasts
from attnres_train.parallel.ranks import Ranks
from attnres_train.pipeline.run.engine import Engine


class PlannedPass:
    """`decoding.Pass` over the chunks of a pipeline: a micro-batch of the plan, forward only. Every
    rank of the pipeline has the logits afterwards. Collective."""

    def __init__(self, chunks: Mapping[int, ModelChunk], engine: Engine, ranks: Ranks) -> None:
        """``engine`` is the one that trains ``chunks``."""
        stage, self.ranks = engine.stage, ranks
        self.vocab_size = next(iter(chunks.values())).config.vocab_size
        self.engine = Engine(
            {index: partial(self._go_on, chunk) for index, chunk in chunks.items()},
            stage.plan,
            stage.rank,
            stage.transport,
            stage.hidden_size,
            stage.stream_dtype,
            stage.device,
            stage.debug,
            on_pass=stage.on_pass,
        )
        self._pasts: Pasts = {}
        self._logits: Tensor | None = None

    def __call__(self, batch: MicroBatch, pasts: Pasts) -> Tensor:
        self._pasts, self._logits = pasts, None
        self.engine.evaluate([batch])
        logits, self._pasts = self._logits, {}
        if self.ranks.pipeline.size() == 1:
            assert logits is not None
            return logits
        if logits is None:
            shape = len(batch.tokens), self.vocab_size
            wide = torch.promote_types(self.engine.stage.stream_dtype, torch.float32)
            logits = torch.empty(shape, dtype=wide, device=self.ranks.device)
        last = self.ranks.own_pipeline[-1]
        dist.broadcast(logits, last, group=self.ranks.pipeline)
        return logits

    def _go_on(
        self,
        chunk: ModelChunk,
        batch: MicroBatch,
        blocks: Mapping[int, Tensor],
        partial: Tensor | None,
        on_block: OnBlock,
    ) -> ChunkOutput:
        completed, partial, logits = chunk.go_on(batch, blocks, partial, self._pasts)
        if logits is None:
            return ChunkOutput(completed, partial, None)
        self._logits = logits.to(torch.promote_types(chunk_dtype(chunk), torch.float32))
        return ChunkOutput(completed, None, logits.new_zeros(()))


def chunk_dtype(chunk: ModelChunk) -> torch.dtype:
    """Of the stream."""
    return chunk.stream_dtype or chunk.norm.weight.dtype


def decoder_of(chunks: Mapping[int, ModelChunk], engine: Engine, ranks: Ranks) -> CachedDecoder:
    """The decoder of this rank, which makes its passes with those of the others."""
    layers = [layer.index for chunk in chunks.values() for layer in chunk.decoder_layers]
    return CachedDecoder(PlannedPass(chunks, engine, ranks), layers, ranks.device)


class _Leading:
    """The main rank's `Decoder`: tells the others what it does."""

    def __init__(self, own: Decoder, tell: Callable[[list[Any]], None]) -> None:
        self.own, self.tell = own, tell

    def begin(self, prompts: Sequence[Sequence[int]], room: int) -> Tensor:
        return self._both("begin", [list(prompt) for prompt in prompts], room)

    def step(self, tokens: Sequence[int]) -> Tensor:
        return self._both("step", list(tokens))

    def keep(self, rows: Sequence[int]) -> None:
        self._both("keep", list(rows))

    def _both(self, name: str, *arguments: Any) -> Any:
        self.tell([name, *arguments])
        return getattr(self.own, name)(*arguments)


@contextmanager
def led_by_main(own: Decoder, ranks: Ranks) -> Iterator[Decoder | None]:
    """On the main rank, a decoder for the context; all others get None, and have done the passes of
    the main rank's context when theirs begins. Collective."""

    def tell(asked: list[Any] | None) -> None:
        dist.broadcast_object_list([asked], 0, group=ranks.control)

    if ranks.is_main:
        try:
            yield _Leading(own, tell)
        finally:
            tell(None)
        return
    while (asked := _heard(ranks)) is not None:
        name, *arguments = asked
        getattr(own, name)(*arguments)
    yield None


def _heard(ranks: Ranks) -> list[Any] | None:
    box: list[list[Any] | None] = [None]
    dist.broadcast_object_list(box, 0, group=ranks.control)
    return box[0]
