"""Loss, perplexity and bits per byte of some sequences, each with a standard error.

Shapes: N sequences.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class Figures:
    """What the tokens of some sequences came to. Errors are standard errors over sequences
    (`ratio`); None where there are fewer than two, or no bytes are known."""

    sequences: int
    tokens: int
    """Those with a loss."""
    bytes: float | None
    """Of the text that they stand for."""
    loss: float
    """Nats per token."""
    loss_error: float | None
    perplexity: float
    """exp(loss)."""
    perplexity_error: float | None
    """perplexity x loss_error, to first order."""
    bits_per_byte: float | None
    bits_per_byte_error: float | None
    accuracy: float
    """Share of the tokens that were the likeliest."""

    def plain(self) -> dict[str, float | None]:
        return asdict(self)


@dataclass(frozen=True)
class Sums:
    """Of each sequence, float64 [N]: the nats of its tokens with a loss, their number, the bytes of
    the text that they stand for (None: not known), and how many were the likeliest."""

    nats: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray | None
    best: np.ndarray

    def of(self, which: np.ndarray) -> Sums:
        """Those of the sequences ``which``, bool [N]."""
        sizes = None if self.bytes is None else self.bytes[which]
        return Sums(self.nats[which], self.tokens[which], sizes, self.best[which])

    def figures(self) -> Figures | None:
        """None where no token counts."""
        if not self.tokens.sum():
            return None
        loss, loss_error = ratio(self.nats, self.tokens)
        bits, bits_error = None, None
        if self.bytes is not None and self.bytes.sum():
            bits, bits_error = ratio(self.nats / math.log(2), self.bytes)
        perplexity = math.exp(min(loss, 700.0))
        return Figures(
            sequences=int(np.count_nonzero(self.tokens)),
            tokens=round(self.tokens.sum()),
            bytes=None if self.bytes is None else float(self.bytes.sum()),
            loss=loss,
            loss_error=loss_error,
            perplexity=perplexity,
            perplexity_error=None if loss_error is None else perplexity * loss_error,
            bits_per_byte=bits,
            bits_per_byte_error=bits_error,
            accuracy=float(self.best.sum() / self.tokens.sum()),
        )


def ratio(numerators: np.ndarray, denominators: np.ndarray) -> tuple[float, float | None]:
    """R = sum of x_i / sum of y_i over N sequences, and its standard error

        sqrt( N / (N - 1)  sum of (x_i - R y_i)^2 ) / sum of y_i,

    that of a ratio of means to first order (Cochran, Sampling Techniques, section 2.11); where all
    y are equal, that of the mean of x_i / y_i. Sequences with y_i = 0 are left out. The tokens of
    one sequence depend on each other; sequences are taken to be independent.
    """
    x, y = (values[denominators > 0] for values in (numerators, denominators))
    total = float(y.sum())
    value = float(x.sum()) / total
    if len(y) < 2:
        return value, None
    spread = len(y) / (len(y) - 1) * float(np.square(x - value * y).sum())
    return value, math.sqrt(spread) / total
