"""The loss over the fixed validation batches, in the middle of training."""

from __future__ import annotations

import math

import torch

from attnres_train.config.schema import TrainSection
from attnres_train.observe.observer import Record
from attnres_train.parallel.ranks import Ranks
from attnres_train.training.batches import StepBatches
from attnres_train.training.parts import Parts
from attnres_train.training.totals import over_ranks


@torch.no_grad()
def validate(train: TrainSection, ranks: Ranks, parts: Parts, batches_here: StepBatches) -> Record:
    """Mean loss over ``train.eval_iters`` batches: ``validation_loss``, nats per token, and
    ``validation_bits_per_byte`` where the bytes of tokens are known (`data.token_bytes`).
    Collective."""
    chunks = parts.chunks.values()
    for chunk in chunks:
        chunk.eval()
    total = num_tokens = num_bytes = 0.0
    for index in range(train.eval_iters):
        batches = parts.data.validation_batches(index, ranks.dp_rank, ranks.dp_size)
        loss_tokens = batches_here.mean_loss_tokens(batches)
        result = parts.engine.evaluate(batches_here.to_device(batches, loss_tokens))
        share = loss_tokens.item()
        total += share * over_ranks(ranks, result).loss
        num_tokens += share
        sizes = (parts.data.text_bytes(batch) for batch in batches)
        num_bytes += batches_here.mean_over_replicas([x for x in sizes if x is not None]).item()
    parts.pulse.rest()
    for chunk in chunks:
        chunk.train()
    record = {"validation_loss": total / num_tokens}
    if num_bytes:
        record["validation_bits_per_byte"] = total / math.log(2) / num_bytes
    return record
