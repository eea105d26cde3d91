"""Greedy text by the full forward pass of every token: what a cached decode has to equal."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attnres_train.model.batch import MicroBatch
from attnres_train.model.chunk import ModelChunk


@torch.no_grad()
def complete(chunk: ModelChunk, prompt: Tensor, most: int) -> Iterator[int]:
    """The likeliest tokens after ``prompt`` int64 [T], one after another, ``most`` of them at most,
    of a whole model. Its cost per token grows with the text before it."""
    tokens = prompt[None]
    for _ in range(most):
        batch = MicroBatch(tokens, tokens, torch.ones_like(tokens, dtype=torch.float32))
        best = chunk.logits(batch, {}, None)[:, -1:].argmax(-1)
        yield int(best)
        tokens = torch.cat([tokens, best], dim=1)
