"""The loss over the fixed validation batches, in the middle of training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import zip_longest

import torch
from torch import Tensor

from attnres_train.config.schema import TrainSection
from attnres_train.data.loader import Batch, BatchSource
from attnres_train.observe.observer import Record
from attnres_train.parallel.ranks import Ranks
from attnres_train.training.batches import StepBatches
from attnres_train.training.parts import Parts
from attnres_train.training.totals import losses_over_ranks


@torch.no_grad()
def validate(train: TrainSection, ranks: Ranks, parts: Parts, batches_here: StepBatches) -> Record:
    """Mean loss over ``train.eval_iters`` batches: ``validation_loss``, nats per token, and
    ``validation_bits_per_byte`` where the bytes of tokens are known (`data.token_bytes`). Of
    several corpora also ``validation_loss/<corpus>`` and ``validation_bits_per_byte/<corpus>`` of
    each of which a token counts. Collective."""
    chunks, data = parts.chunks.values(), parts.data
    corpora = data.validated if len(data.validated) > 1 else []
    count = len(corpora) or 1
    for chunk in chunks:
        chunk.eval()
    nats, tokens, sizes = ([0.0] * count for _ in range(3))
    for index in range(train.eval_iters):
        place = index, ranks.dp_rank, ranks.dp_size
        batches = data.validation_batches(*place)
        groups = data.validation_groups(*place) if corpora else []
        pairs = zip_longest(batches, groups)
        counts = batches_here.mean_over_replicas([_counts(data, *pair) for pair in pairs])
        loss_tokens = counts[0].sum()
        result = parts.engine.evaluate(batches_here.to_device(batches, loss_tokens, groups))
        losses = losses_over_ranks(ranks, result, count)
        of_tokens, of_bytes = counts.tolist()
        share = loss_tokens.item()
        for corpus in range(count):
            nats[corpus] += share * losses[corpus]
            tokens[corpus] += of_tokens[corpus]
            sizes[corpus] += of_bytes[corpus]
    parts.pulse.rest()
    for chunk in chunks:
        chunk.train()
    record = dict(_figures("", sum(nats), sum(tokens), sum(sizes)))
    for name, *sums in zip(corpora, nats, tokens, sizes, strict=False):
        record |= _figures(f"/{name}", *sums)
    return record


def _counts(data: BatchSource, batch: Batch, groups: Tensor | None) -> Tensor:
    """Tokens with a loss, and bytes of the text that they stand for (0: not known), of each of G
    corpora: fp64 [2, G]."""
    mask, sizes = batch["loss_mask"], data.text_bytes(batch)
    both = [mask, torch.zeros_like(mask) if sizes is None else sizes]
    if groups is None:
        return torch.stack([x.sum(dtype=torch.float64) for x in both]).unsqueeze(1)
    return torch.stack([x.sum(1, dtype=torch.float64) @ groups.double() for x in both])


def _figures(end: str, nats: float, tokens: float, size: float) -> Iterator[tuple[str, float]]:
    """Keys of a record, which end in ``end``, and their values."""
    if tokens:
        yield f"validation_loss{end}", nats / tokens
    if size:
        yield f"validation_bits_per_byte{end}", nats / math.log(2) / size
