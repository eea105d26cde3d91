"""Token frequencies: the loss of a model that knows them and nothing else is what training must
beat. And which ids a corpus has at all: those that no embedding is there for end a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from attnres_train.errors import UserError

# Training tokens of a corpus that are counted, in random order.
UNIGRAM_TOKENS = 1 << 26
COUNT_AT_ONCE = 1 << 20


def count_unigrams(dataset: Any, vocab_size: int, where: str) -> np.ndarray:
    """How often each token id occurs in (the first UNIGRAM_TOKENS of) a GPTDataset's documents.

    Raises UserError naming ``where`` at an id that the model has no embedding for.
    """
    counts = np.zeros(vocab_size, np.int64)
    pending: list[np.ndarray] = []
    num_pending = num_counted = 0
    for piece in _pieces(dataset):
        pending.append(piece)
        num_pending += len(piece)
        if num_pending >= COUNT_AT_ONCE:
            counts += _counted(pending, vocab_size, where)
            num_counted += num_pending
            pending, num_pending = [], 0
            if num_counted >= UNIGRAM_TOKENS:
                break
    return counts + _counted(pending, vocab_size, where) if pending else counts


def _pieces(dataset: Any) -> Iterator[np.ndarray]:
    """The tokens of a GPTDataset's documents in its order, a long one in pieces."""
    for sequence in map(int, dataset.document_index):
        length = dataset.dataset.length(sequence)
        for start in range(0, length, COUNT_AT_ONCE):
            yield dataset.dataset.get(sequence, start, min(COUNT_AT_ONCE, length - start))


def _counted(pieces: list[np.ndarray], vocab_size: int, where: str) -> np.ndarray:
    ids = np.concatenate(pieces)
    check_ids(ids, vocab_size, where)
    return np.bincount(ids, minlength=vocab_size)


def check_ids(ids: Any, vocab_size: int, where: str) -> None:
    """Raises UserError when ``ids`` (an array or a tensor) leaves [0, vocab_size)."""
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise UserError(
            f"{where} holds token id {low if low < 0 else high}, but model.vocab_size is "
            f"{vocab_size}: it was tokenised for another vocabulary"
        )


def unigram_entropy(counts: Sequence[np.ndarray], weights: Sequence[float]) -> float:
    """Entropy in nats per token, H = -sum p ln p, of the blend's token distribution
    p = sum_c w_c p_c: the loss of a model that knows token frequencies and nothing else.
    """
    blend = sum(w * c / c.sum() for c, w in zip(counts, weights, strict=True)) / sum(weights)
    present = blend[blend > 0]
    return float(-(present * np.log(present)).sum())
