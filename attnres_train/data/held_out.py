"""What of a corpus is held out for validation: documents by their hash, or, where those are too
few, the end of the longest one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from attnres_train.config.schema import RunConfig


@dataclass(frozen=True)
class Cut:
    """A sequence of which training sees the first ``tokens`` and validation the others."""

    sequence: int
    tokens: int


@dataclass(frozen=True)
class Sides:
    """Of the sequences of a corpus, those for training and those for validation, int32, ascending.
    A ``cut`` one is in ``train`` under its number, and its end in ``valid`` under the number after
    the last sequence's (`indexed.TokenSequences`)."""

    train: np.ndarray
    valid: np.ndarray
    documents: int
    held_out: int
    """Documents that are held out whole."""
    lent_tokens: int = 0
    """Last tokens of the longest document that are held out."""
    cut: Cut | None = None


def held_out_share(config: RunConfig) -> float:
    """Share of the documents that is held out; 0 without validation."""
    train, valid = config.data.split
    return valid / (train + valid) if config.train.eval_interval else 0.0


def is_held_out(hashes: np.ndarray, share: float) -> np.ndarray:
    """Whether each document is held out, by its hash, uint64: hash / 2^64 < ``share``. Nothing else
    counts, so that no document changes sides when others come or go."""
    limit = int(share * 2**64)
    return np.ones(len(hashes), bool) if limit >= 2**64 else hashes < np.uint64(limit)


def part(
    lengths: np.ndarray, starts: np.ndarray, hashes: np.ndarray, share: float, needed: int | None
) -> Sides:
    """Part a corpus of sequences of ``lengths`` (tokens, int32), at which documents start at
    ``starts`` (ascending) and have ``hashes``. ``needed``: tokens of a sample.

    Where the documents held out make no sample, the corpus lends validation the last
    max(needed, share x tokens) tokens of its longest document, as far as training keeps a sample.
    Where that would not do, there is no validation on it: those documents are then on no side, so
    that none moves across when the corpus has grown. Training has them only where it would have no
    sample without. With ``needed`` None the hash alone decides.
    """
    sizes = np.add.reduceat(lengths, starts, dtype=np.int64) if len(starts) else np.zeros(0, int)
    held = is_held_out(hashes, share)
    total, valid = int(sizes.sum()), int(sizes[held].sum())
    document, lent = -1, 0
    if needed is not None and share and total - valid < needed:
        held[:], valid = False, 0
    if needed is not None and share and valid < needed:
        document = _longest(sizes, hashes, ~held)
        room = min(int(sizes[document]), total - valid - needed) if document >= 0 else 0
        lent = max(0, min(max(needed, round(share * total)), room))
        lent = lent if valid + lent >= needed else 0
    stops = np.append(starts[1:], len(lengths))
    side = np.repeat(held, stops - starts)
    cut = None
    if lent:
        sequences = range(int(starts[document]), int(stops[document]))
        cut = _lend(lengths, sequences, int(sizes[document]) - lent, side)
    outside = needed is not None and share and valid + lent < needed
    others = np.zeros(0, int) if outside else np.flatnonzero(side)
    more = [len(lengths)] if cut else []
    return Sides(
        train=np.flatnonzero(~side).astype(np.int32),
        valid=np.append(others, more).astype(np.int32),
        documents=len(starts),
        held_out=int(held.sum()),
        lent_tokens=lent,
        cut=cut,
    )


def _longest(sizes: np.ndarray, hashes: np.ndarray, among: np.ndarray) -> int:
    """The longest document ``among`` those that are there once: training would see the end of the
    other one. Of equal length, that of the lowest hash, whatever their order. -1: there is none."""
    _, first, count = np.unique(hashes, return_index=True, return_counts=True)
    once = first[count == 1]  # in the order of their hashes
    once = once[among[once]]
    return int(once[np.argmax(sizes[once])]) if len(once) else -1


def _lend(lengths: np.ndarray, sequences: range, kept: int, side: np.ndarray) -> Cut | None:
    """Give the ``sequences`` of a document to validation in ``side``, but for its first ``kept``
    tokens. Returns the one that has to be cut."""
    cut = None
    for sequence in sequences:
        length = int(lengths[sequence])
        if 0 < kept < length:
            cut = Cut(sequence, kept)
        elif kept <= 0:
            side[sequence] = True
        kept -= length
    return cut
