"""The choice of the next token (temperature, top-k, nucleus: Holtzman et al., arXiv 1904.09751).

Shapes: V vocabulary.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from attnres_train.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. ``temperature`` 0: always the likeliest (greedy). Else logits are
    divided by it; of the likeliest ``top_k`` (None: all) the fewest are kept that have together
    ``top_p`` of the probability, and one is drawn.

    Raises UserError for values out of range.
    """

    temperature: float = 0.8
    top_p: float = 1.0
    top_k: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}: it is 0 (greedy) or above")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}: it is above 0 and at most 1")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}: it is at least 1")

    def chooser(self, row: int) -> Chooser:
        """What chooses for text number ``row``: of the seed and the number alone, whatever other
        texts there are."""
        digest = hashlib.sha256(f"{self.seed}/{row}".encode()).digest()
        rng = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
        return Chooser(self, rng)


class Chooser:
    """Chooses the tokens of one text, in order."""

    def __init__(self, sampling: Sampling, rng: torch.Generator) -> None:
        self.sampling, self._rng = sampling, rng

    def __call__(self, logits: Tensor) -> int:
        """A token by ``logits`` [V] on the CPU."""
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        tokens, chances = self.chances(logits)
        # By hand: the draw of torch.multinomial differs between versions and devices.
        point = torch.rand((), generator=self._rng, dtype=torch.float64)
        place = int(torch.searchsorted(chances.cumsum(0), point * chances.sum(), right=True))
        return int(tokens[min(place, len(tokens) - 1)])

    def chances(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens that may be chosen, the likeliest first, and their chances in fp64, which need not
        sum to 1."""
        # Stable, so that of equal ones the first comes first everywhere.
        scaled, tokens = (logits.double() / self.sampling.temperature).sort(
            descending=True, stable=True
        )
        scaled = scaled[: self.sampling.top_k]
        chances = scaled.softmax(0)
        before = chances.cumsum(0) - chances
        count = max(1, int((before < self.sampling.top_p).sum()))
        return tokens[:count], chances[:count]
