"""Text in front of a model and out of it: prompts to tokens, tokens to text as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from attnres_train.data.tokenizers.tokenizer import Tokenizer
from attnres_train.errors import UserError
from attnres_train.inference.decoding import Decoder, generate
from attnres_train.inference.sampling import Sampling

_BROKEN = "\ufffd"
_CONTEXT = 8
"""Tokens of a prompt with which the first new ones are decoded: some tokenizers write a blank in
front of a word unless it is the first."""


def prompt_tokens(
    tokenizer: Tokenizer,
    text: str,
    most: int | None,
    name: str = "the prompt",
    way_on: str = "",
) -> list[int]:
    """The tokens of ``text``; of an empty one the token that ends documents, after which another
    begins.

    Raises UserError where the tokenizer has no token for some of it, and for more than ``most``
    tokens, the length of the model's samples: nothing in the model counts positions, but more than
    that it has never seen. ``name`` and ``way_on`` are for messages: what else can be done.
    """
    before = tokenizer.dropped
    tokens = tokenizer.encode(text)
    lost = tokenizer.dropped - before
    unknown = 0 if tokenizer.unknown is None else tokens.count(tokenizer.unknown)
    if lost or unknown:
        what = f"{lost} of its characters" if lost else f"{unknown} of its pieces"
        raise UserError(f"{name}: {tokenizer.source} has no token for {what}")
    if most is not None and len(tokens) > most:
        raise UserError(
            f"{name} has {len(tokens):,} tokens, but the model was trained on samples of {most:,} "
            f"(train.seq_length): shorten it{way_on}"
        )
    return tokens or [tokenizer.eod]


class TextStream:
    """Tokens of one text to pieces of text, each of whole characters."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        context = [token for token in prompt[-_CONTEXT:] if token != tokenizer.eod]
        self._tokens, self._told = context, len(context)
        self._start = 0

    def add(self, token: int) -> str:
        """The text that ``token`` makes whole; empty where its last character is not yet."""
        self._tokens.append(token)
        return self._piece(at_end=False)

    def end(self) -> str:
        """What is left, broken characters as U+FFFD."""
        return self._piece(at_end=True)

    def _piece(self, *, at_end: bool) -> str:
        # Between two places where text was whole, so that the work per token stays the same.
        before = self._tokenizer.decode(self._tokens[self._start : self._told])
        now = self._tokenizer.decode(self._tokens[self._start :])
        if len(now) <= len(before) or (now.endswith(_BROKEN) and not at_end):
            return ""
        self._start, self._told = self._told, len(self._tokens)
        return now[len(before) :]


class Text(NamedTuple):
    """What became of a prompt: the ``text`` after it, its ``tokens`` and whether the document ended
    (else it was cut)."""

    text: str
    tokens: list[int]
    ended: bool


def complete(
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    max_new_tokens: int,
) -> list[Text]:
    """A text after each of ``prompts``."""
    tokens: list[list[int]] = [[] for _ in prompts]
    end, known = tokenizer.eod, tokenizer.vocab_size
    for row, token in generate(decoder, prompts, sampling, max_new_tokens, end, known):
        tokens[row].append(token)
    texts = []
    for prompt, new in zip(prompts, tokens, strict=True):
        ended, stream = bool(new) and new[-1] == end, TextStream(tokenizer, prompt)
        pieces = [stream.add(token) for token in (new[:-1] if ended else new)]
        texts.append(Text("".join([*pieces, stream.end()]), new, ended))
    return texts
