"""How the tokens of prompts come into the pasts of the layers: by pieces, a pass each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from attnres_train.inference.cache import Cache
from attnres_train.model.batch import MicroBatch
from attnres_train.model.walk import Pasts

PREFILL_TOKENS = 512
"""Tokens of a prompt that a rank passes at once: what it needs of memory beside the cache."""


@dataclass(frozen=True)
class Piece:
    """New tokens of texts, and the ``pasts`` that they go on from, which take them up: a pass.
    ``asks``: whether logits are wanted, those [B, V] of the last token of every text."""

    batch: MicroBatch
    pasts: Pasts
    asks: bool

    @classmethod
    def of(cls, tokens: Tensor, pasts: Pasts, *, asks: bool) -> Piece:
        """Of ``tokens``, int64 [B, t], those that this process passes."""
        return cls(MicroBatch.of_tokens(tokens), pasts, asks)

    @property
    def tokens(self) -> Tensor:
        return self.batch.tokens


class Prefill(Protocol):
    """Cuts prompts into pieces."""

    def pieces(self, tokens: Tensor, cache: Cache) -> Iterator[Piece]:
        """Those of a prompt, ``tokens`` int64 [1, T], in order; ``cache``, which is empty, holds
        all of it after them. The last one asks for logits, and no other."""
        ...


class WholePrefill:
    """The `Prefill` of a process that passes all tokens itself, ``most`` at a time."""

    def __init__(self, most: int = PREFILL_TOKENS) -> None:
        self.most = most

    def pieces(self, tokens: Tensor, cache: Cache) -> Iterator[Piece]:
        *before, last = tokens.split(self.most, 1)
        for piece in before:
            yield Piece.of(piece, cache.pasts, asks=False)
        yield Piece.of(last, cache.pasts, asks=True)
