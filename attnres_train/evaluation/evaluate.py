"""The losses of an opened model on samples, by corpus and by position in the sequence.

Shapes: N sequences, B of them at a time, T tokens of each, K buckets of positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from attnres_train.errors import UserError
from attnres_train.evaluation.figures import Figures, Sums
from attnres_train.evaluation.samples import EvaluationSamples
from attnres_train.model.batch import MicroBatch
from attnres_train.model.chunk import ModelChunk

Key = TypeVar("Key")
FIRST_BUCKET = 16
"""Positions of the first bucket; every other one is as long as all before it."""


@dataclass(frozen=True)
class Evaluation:
    """What a model came to."""

    whole: Figures
    corpora: dict[str, Figures]
    """By key and name."""
    positions: dict[tuple[int, int], Figures]
    """By the tokens in front of the predicted one that the sequence has: from, up to (not
    included)."""


def evaluate(
    chunk: ModelChunk,
    samples: EvaluationSamples,
    batch_size: int,
    on_batch: Callable[[int], None] = lambda sequences: None,
) -> Evaluation:
    """The figures of ``chunk``, a whole model, on ``samples``, ``batch_size`` of them at a time.
    ``on_batch`` is told how many were done. Raises UserError where no token has a loss."""
    edges = position_edges(samples.length)
    rows: list[list[np.ndarray]] = []
    corpora: list[int] = []
    for start in range(0, len(samples.numbers), batch_size):
        numbers = samples.numbers[start : start + batch_size]
        rows.append(_sums(chunk, samples, numbers, edges))
        corpora += [samples.corpus(number) for number in numbers]
        on_batch(len(numbers))
    nats, tokens, sizes, best = (np.concatenate(found) for found in zip(*rows, strict=True))
    known = samples.data.token_bytes is not None

    def sums(columns: slice) -> Sums:
        of = [x[:, columns].sum(1) for x in (nats, tokens, sizes, best)]
        return Sums(of[0], of[1], of[2] if known else None, of[3])

    every, which = sums(slice(None)), np.array(corpora)
    named = ((name, every.of(which == number)) for number, name in samples.names.items())
    buckets = ((edge, sums(slice(k, k + 1))) for k, edge in enumerate(pairwise(edges)))
    whole = every.figures()
    if whole is None:
        raise UserError("no token of these samples has a loss: nothing can be said of them")
    return Evaluation(whole, dict(_known(named)), dict(_known(buckets)))


def position_edges(length: int) -> list[int]:
    """Edges of the buckets of positions 0 .. ``length`` - 1: 0, 16, 32, 64, ..., ``length``."""
    edges, edge = [0], FIRST_BUCKET
    while edge < length:
        edges.append(edge)
        edge *= 2
    return [*edges, length]


def _known(pairs: Iterable[tuple[Key, Sums]]) -> Iterator[tuple[Key, Figures]]:
    for key, sums in pairs:
        if (figures := sums.figures()) is not None:
            yield key, figures


def _sums(
    chunk: ModelChunk, samples: EvaluationSamples, numbers: Sequence[int], edges: list[int]
) -> list[np.ndarray]:
    """Nats, tokens, bytes and likeliest tokens of each sequence and bucket, float64 [B, K]."""
    batch = samples.batch(numbers)
    sizes = samples.data.text_bytes(batch)
    mask = batch["loss_mask"].double()
    device = chunk.norm.weight.device
    found = chunk.token_losses(MicroBatch.of_samples(batch).to(device))
    nats, best = found.nats.double().cpu() * mask, found.is_best.cpu() * mask
    # A masked token may have any loss: 0 x inf is none.
    nats = torch.where(mask > 0, nats, 0.0)
    sizes = torch.zeros_like(mask) if sizes is None else sizes
    return [_in_buckets(x, edges) for x in (nats, mask, sizes, best)]


def _in_buckets(values: Tensor, edges: list[int]) -> np.ndarray:
    """Sums [B, K] of ``values`` [B, T]."""
    parts = (values[:, start:stop].sum(1) for start, stop in pairwise(edges))
    return torch.stack(list(parts), dim=1).numpy()
