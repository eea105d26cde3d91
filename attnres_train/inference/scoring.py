"""The losses of the tokens of given texts, by one process or by ranks that share the model.

Shapes: B texts, T tokens of each that are predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from attnres_train.model.batch import MicroBatch
from attnres_train.model.chunk import ChunkOutput, ModelChunk
from attnres_train.model.head import TokenLosses
from attnres_train.model.walk import OnBlock
from attnres_train.parallel.ranks import Ranks
from attnres_train.pipeline.run.engine import Engine

Losses = Callable[[Tensor], TokenLosses]
"""Tokens int64 [B, T + 1] -> of each but the first, [B, T]."""


def losses_of(chunk: ModelChunk) -> Losses:
    """By a whole model."""
    return lambda tokens: chunk.token_losses(_to_predict(tokens))


def _to_predict(tokens: Tensor) -> MicroBatch:
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    mask = torch.ones_like(labels, dtype=torch.float32)
    return MicroBatch(inputs, labels, mask, loss_tokens=mask.sum())


class PlannedLosses:
    """`Losses` over ``ranks``, with the ``chunks`` that ``engine`` drives: texts go through the
    pipeline in as many micro-batches as it has stages, and ranks that share samples in training
    share them here. Of those the first has all losses. Collective."""

    def __init__(self, chunks: Mapping[int, ModelChunk], engine: Engine, ranks: Ranks) -> None:
        chunk = next(iter(chunks.values()))
        self.ranks, self.sequence = ranks, chunk.ports.sequence
        passes = {index: partial(self._run, chunk) for index, chunk in chunks.items()}
        self.engine = engine.over(passes, chunk.ports.split.stream)
        shares = self.sequence.shares.count
        # A share is as long as what a convolution sees in front of it, at least.
        reach = max(1, chunk.config.kda.short_conv_kernel_size - 1)
        self.even = shares * reach if shares > 1 else 1
        self._found: list[TokenLosses] = []

    def __call__(self, tokens: Tensor) -> TokenLosses:
        length = tokens.shape[1] - 1
        # What is behind a token says nothing of it.
        tokens = F.pad(tokens, (0, -length % self.even))
        stages, self._found = self.ranks.pipeline.size(), []
        batches = [_to_predict(rows).of(self.sequence.shares) for rows in tokens.chunk(stages)]
        self.engine.evaluate(batches)
        # One message: nats, and 1 or 0 for the likeliest.
        wide = torch.promote_types(self.engine.stage.stream_dtype, torch.float32)
        here = sum(len(batch.tokens) for batch in batches), batches[0].tokens.shape[1], 2
        both = torch.empty(here, dtype=wide, device=self.ranks.device)
        if self._found:  # on the last stage
            each = [torch.stack([x.nats, x.is_best.to(wide)], -1) for x in self._found]
            both.copy_(torch.cat(each))
        if stages > 1:
            dist.broadcast(both, self.ranks.own_pipeline[-1], group=self.ranks.pipeline)
        (both,) = self.sequence.gather([both])
        nats, is_best = both[:, :length].unbind(-1)
        return TokenLosses(nats, is_best > 0)

    def _run(
        self,
        chunk: ModelChunk,
        batch: MicroBatch,
        blocks: Mapping[int, Tensor],
        partial: Tensor | None,
        on_block: OnBlock,
    ) -> ChunkOutput:
        with chunk.ports.split.passing(batch.tokens.shape[1]):
            completed, partial, losses = chunk.score(batch, blocks, partial)
        if losses is None:
            return ChunkOutput(completed, partial, None)
        self._found.append(losses)
        return ChunkOutput(completed, None, losses.nats.new_zeros(()))
