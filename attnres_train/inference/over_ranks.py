"""Text from a model that is spread over ranks: pipeline stages, shared experts, heads and tokens,
replicas.

The main rank has the texts. What it asks of the model it tells all other ranks, which do the same
passes with their layers; each keeps the pasts of those. Of a prompt ranks may share the tokens
(`shared_prefill`), and stages work on different pieces at once.

Shapes: B texts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from attnres_train.inference.decoding import CachedDecoder, Reader
from attnres_train.inference.prefill import Piece, Prefill, WholePrefill
from attnres_train.inference.scoring import PlannedLosses
from attnres_train.inference.shared_prefill import SharedPrefill
from attnres_train.model.chunk import ChunkOutput, ModelChunk
from attnres_train.model.head import TokenLosses
from attnres_train.model.walk import OnBlock
from attnres_train.parallel.ranks import Ranks
from attnres_train.pipeline.run.engine import Engine

AT_ONCE = 4
"""Pieces of a prompt, times the stages P, that go through a pipeline together. Stages idle for
(P - 1) / (5 P - 1) of that time; each number of pieces has a program, which is made once."""


class PlannedPasses:
    """`decoding.Passes` over the chunks of a pipeline: pieces are micro-batches of the plan, of
    forward passes alone. Every rank of the pipeline has the logits afterwards. Collective."""

    def __init__(self, chunks: Mapping[int, ModelChunk], engine: Engine, ranks: Ranks) -> None:
        """``engine`` is the one that trains ``chunks``."""
        self.ranks, chunk = ranks, next(iter(chunks.values()))
        self.vocab_size = chunk.config.vocab_size
        passes = {index: partial(self._go_on, chunk) for index, chunk in chunks.items()}
        self.engine = engine.over(passes, chunk.ports.split.stream)
        self._asked: list[Tensor] = []

    def __call__(self, pieces: Iterable[Piece]) -> Tensor:
        asking, found = 0, []
        pieces, most = iter(pieces), AT_ONCE * self.ranks.pipeline.size()
        while together := list(islice(pieces, most)):
            self._asked = []
            self.engine.evaluate(together)
            found += self._asked
            asking += sum(len(piece.tokens) for piece in together if piece.asks)
        wide = torch.promote_types(self.engine.stage.stream_dtype, torch.float32)
        logits = torch.empty(asking, self.vocab_size, dtype=wide, device=self.ranks.device)
        if found:  # on the last stage
            logits.copy_(torch.cat(found))
        if self.ranks.pipeline.size() > 1:
            dist.broadcast(logits, self.ranks.own_pipeline[-1], group=self.ranks.pipeline)
        return logits

    def _go_on(
        self,
        chunk: ModelChunk,
        piece: Piece,
        blocks: Mapping[int, Tensor],
        partial: Tensor | None,
        on_block: OnBlock,
    ) -> ChunkOutput:
        with chunk.ports.split.passing(piece.tokens.shape[1]):
            completed, partial, logits = chunk.go_on(piece.batch, blocks, partial, piece.pasts)
        if logits is None:
            return ChunkOutput(completed, partial, None)
        self._asked += [logits] if piece.asks else []
        return ChunkOutput(completed, None, logits.new_zeros(()))


def decoder_of(chunks: Mapping[int, ModelChunk], engine: Engine, ranks: Ranks) -> CachedDecoder:
    """The decoder of this rank, which makes its passes with those of the others."""
    layers = [layer.index for chunk in chunks.values() for layer in chunk.decoder_layers]
    tensor = ranks.tensor.size()
    prefill: Prefill = WholePrefill()
    if ranks.context.size() * tensor > 1:
        prefill = SharedPrefill(ranks.context, tensor)
    passes, losses = PlannedPasses(chunks, engine, ranks), PlannedLosses(chunks, engine, ranks)
    return CachedDecoder(passes, layers, ranks.device, prefill, losses)


class _Leading:
    """The main rank's `Reader`: tells the others what it does."""

    def __init__(self, own: Reader, tell: Callable[[list[Any]], None]) -> None:
        self.own, self.tell = own, tell

    def begin(self, prompts: Sequence[Sequence[int]], room: int) -> Tensor:
        return self._both("begin", [list(prompt) for prompt in prompts], room)

    def step(self, tokens: Sequence[int]) -> Tensor:
        return self._both("step", list(tokens))

    def keep(self, rows: Sequence[int]) -> None:
        self._both("keep", list(rows))

    def score(self, rows: Sequence[Sequence[int]]) -> TokenLosses:
        return self._both("score", [list(row) for row in rows])

    def _both(self, name: str, *arguments: Any) -> Any:
        self.tell([name, *arguments])
        return getattr(self.own, name)(*arguments)


@contextmanager
def led_by_main(own: Reader, ranks: Ranks) -> Iterator[Reader | None]:
    """On the main rank, a reader for the context; all others get None, and have done the passes of
    the main rank's context when theirs begins. Collective."""

    def tell(asked: list[Any] | None) -> None:
        dist.broadcast_object_list([asked], 0, group=ranks.control)

    if ranks.is_main:
        yield _Leading(own, tell)
        # Not after a failure, which ends the run: others may be in a pass that comes to no end.
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
