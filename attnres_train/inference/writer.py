"""Texts from a model on the screen, as they come."""

from __future__ import annotations

import time
from typing import NamedTuple

from attnres_train.data.tokenizers.tokenizer import Tokenizer
from attnres_train.errors import UserError
from attnres_train.inference.decoding import Decoder, generate
from attnres_train.inference.sampling import Sampling
from attnres_train.inference.text import TextStream, complete, prompt_tokens
from attnres_train.screen import complain, say


class Writer(NamedTuple):
    """Writes texts of ``max_new_tokens`` at most, with whatever decoder it is given."""

    tokenizer: Tokenizer
    sampling: Sampling
    max_new_tokens: int
    longest: int | None
    """Prompt, in tokens (None: any)."""

    def tokens(self, prompt: str) -> list[int]:
        """Raises UserError as `prompt_tokens`."""
        way_on = ", or go beyond with --any-length"
        return prompt_tokens(self.tokenizer, prompt, self.longest, way_on=way_on)

    def converse(self, decoder: Decoder) -> None:
        """A line of standard input is a prompt; its end ends it, and so does the end of whoever
        reads the texts."""
        complain("a prompt a line; an empty one begins a document; Ctrl-D ends")
        while say("> ", end="") is None:
            try:
                prompt = input()
            except EOFError:
                say("")
                return
            try:
                tokens = self.tokens(prompt)
            except UserError as error:
                complain(f"error: {error}")
                continue
            say(prompt, end="")
            if not self.write(decoder, tokens):
                return

    def write(self, decoder: Decoder, prompt: list[int]) -> bool:
        """The text after ``prompt`` on the screen, a piece at a time; how fast on stderr. Returns
        whether somebody has read it to its end."""
        stream, end = TextStream(self.tokenizer, prompt), self.tokenizer.eod
        started, count, token = time.perf_counter(), 0, -1
        known = self.tokenizer.vocab_size
        for _, token in generate(decoder, [prompt], self.sampling, self.max_new_tokens, end, known):
            count += 1
            piece = stream.add(token) if token != end else ""
            if say(piece, end="") is not None:  # its reader has seen enough
                return False
        seconds = time.perf_counter() - started
        say(stream.end())
        how = "to the end of the document" if token == end else "cut there"
        complain(f"[{count} tokens, {how}; {count / seconds:.0f} tokens/s]")
        return True

    def lines(
        self, decoder: Decoder, prompts: list[str], tokens: list[list[int]]
    ) -> list[dict[str, object]]:
        """What became of each prompt, for JSON."""
        texts = complete(decoder, self.tokenizer, tokens, self.sampling, self.max_new_tokens)
        return [
            {
                "prompt": prompt,
                "text": text.text,
                "tokens": text.tokens,
                "prompt_tokens": len(given),
                "ended": text.ended,
            }
            for prompt, given, text in zip(prompts, tokens, texts, strict=True)
        ]
