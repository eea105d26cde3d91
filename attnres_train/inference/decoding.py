"""The next token of several texts at once, by passes over what is new of each.

Shapes: B texts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from attnres_train.inference.cache import Cache
from attnres_train.inference.prefill import PREFILL_TOKENS, Piece, Prefill, WholePrefill
from attnres_train.inference.sampling import Sampling
from attnres_train.inference.scoring import Losses, losses_of
from attnres_train.model.chunk import ModelChunk
from attnres_train.model.head import TokenLosses


class Decoder(Protocol):
    """A model that goes on with texts."""

    def begin(self, prompts: Sequence[Sequence[int]], room: int) -> Tensor:
        """Take up ``prompts``, at least a token each; up to ``room`` tokens will follow. Returns
        the logits [B, V] of the token after each, fp32 (fp64) on the CPU."""
        ...

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Take up a token of every text; returns as `begin`."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these of the texts alone."""
        ...


class Reader(Decoder, Protocol):
    """A model that goes on with texts, and says what it makes of given ones."""

    def score(self, rows: Sequence[Sequence[int]]) -> TokenLosses:
        """Of each text the losses of its tokens but the first, [B, T], on the CPU. Rows are as long
        as the longest; what lies behind the end of another means nothing."""
        ...


Passes = Callable[[Iterable[Piece]], Tensor]
"""Runs all layers on the pieces, in order; gives the logits of those that ask, one after the other
[B, V]."""


class CachedDecoder:
    """A `Reader` by ``run`` and ``losses``, with the pasts of ``layers``, those of this process, on
    ``device``.

    A prompt is passed by itself, as ``prefill`` cuts it, so that what is made of it depends on no
    other; then all texts go on together.
    """

    def __init__(
        self,
        run: Passes,
        layers: Sequence[int],
        device: torch.device,
        prefill: Prefill,
        losses: Losses,
    ) -> None:
        self.run, self.layers, self.device = run, layers, device
        self.prefill, self.losses = prefill, losses
        self._cache: Cache | None = None

    @classmethod
    def of(cls, chunk: ModelChunk, prefill: int = PREFILL_TOKENS) -> CachedDecoder:
        """Of a whole model; ``prefill`` tokens of a prompt at a time."""

        def run(pieces: Iterable[Piece]) -> Tensor:
            asked = []
            for piece in pieces:
                logits = chunk.go_on(piece.batch, {}, None, piece.pasts)[2]
                assert logits is not None  # all layers are here
                asked += [logits] if piece.asks else []
            return torch.cat(asked)

        layers = range(chunk.first_layer, chunk.last_layer)
        device = chunk.norm.weight.device
        return cls(run, layers, device, WholePrefill(prefill), losses_of(chunk))

    @torch.no_grad()
    def begin(self, prompts: Sequence[Sequence[int]], room: int) -> Tensor:
        self._cache = None  # of the texts before
        caches = [Cache(self.layers, len(prompt)) for prompt in prompts]
        logits = self._run(
            piece
            for prompt, cache in zip(prompts, caches, strict=True)
            for piece in self.prefill.pieces(self._tensor([list(prompt)]), cache)
        )
        self._cache = Cache.stacked(caches, room)
        return logits

    @torch.no_grad()
    def step(self, tokens: Sequence[int]) -> Tensor:
        assert self._cache is not None, "begin comes first"
        new = self._tensor(list(tokens)).unsqueeze(1)
        return self._run([Piece.of(new, self._cache.pasts, asks=True)])

    def keep(self, rows: Sequence[int]) -> None:
        assert self._cache is not None, "begin comes first"
        self._cache.keep(torch.tensor(rows))

    @torch.no_grad()
    def score(self, rows: Sequence[Sequence[int]]) -> TokenLosses:
        longest = max(map(len, rows))
        # What is behind a token says nothing of it: rows are filled up at their end.
        filled = [[*row, *[0] * (longest - len(row))] for row in rows]
        return TokenLosses(*(x.cpu() for x in self.losses(self._tensor(filled))))

    @property
    def cache_bytes(self) -> int:
        """Of the texts at hand."""
        return self._cache.nbytes if self._cache else 0

    def _tensor(self, tokens: list[Any]) -> Tensor:
        return torch.tensor(tokens, device=self.device)

    def _run(self, pieces: Iterable[Piece]) -> Tensor:
        logits = self.run(pieces)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).cpu()


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    max_new_tokens: int,
    end: int | None = None,
    vocab_size: int | None = None,
) -> Iterator[tuple[int, int]]:
    """(number of the text, its next token), as they come, until each has ``max_new_tokens`` more or
    has come to the token ``end``, which is given too. Of the model's tokens the first
    ``vocab_size`` may come (None: all): a model may have more than its tokenizer.

    A text depends on its prompt, its number and ``sampling`` alone, as far as rounding does: logits
    of a batch differ from those of one text in the last bits.
    """
    if max_new_tokens < 1 or not prompts:
        return
    choosers = [sampling.chooser(row) for row in range(len(prompts))]
    rows = list(range(len(prompts)))
    logits = decoder.begin(prompts, max_new_tokens)
    for count in range(1, max_new_tokens + 1):
        tokens = [
            choosers[row](of_row[:vocab_size]) for row, of_row in zip(rows, logits, strict=True)
        ]
        yield from zip(rows, tokens, strict=True)
        goes_on = [place for place, token in enumerate(tokens) if token != end]
        if not goes_on or count == max_new_tokens:
            return
        if len(goes_on) < len(rows):
            decoder.keep(goes_on)
            rows, tokens = [rows[i] for i in goes_on], [tokens[i] for i in goes_on]
        logits = decoder.step(tokens)
