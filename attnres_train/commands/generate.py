"""`attnres-train generate RUN`: text from a run's model, on the screen as it comes."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from attnres_train.data.tokenizers.tokenizer import Tokenizer
from attnres_train.errors import UserError
from attnres_train.inference.decoding import CachedDecoder, generate
from attnres_train.inference.opening import Opened, choose, open_model
from attnres_train.inference.sampling import Sampling
from attnres_train.inference.text import TextStream, complete, prompt_tokens
from attnres_train.screen import complain, say


def run(args: argparse.Namespace) -> int:
    sampling = Sampling(args.temperature, args.top_p, args.top_k, args.seed)
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {args.max_new_tokens}: it is at least 1")
    if args.interactive and args.json:
        raise UserError("--interactive is a conversation: leave out --json")
    prompts = _prompts(args)
    on_cpu = choose(args.device).type == "cpu"
    # bf16 rounds more than it saves where there is no hardware for it.
    opened = open_model(args.run_folder, args.device, torch.float32 if on_cpu else None)
    writer = Writer.of(opened, sampling, args.max_new_tokens, args.any_length)
    if args.interactive:
        return _converse(writer)
    tokens = [writer.tokens(prompt) for prompt in prompts]
    if args.json:
        for line in writer.lines(prompts, tokens):
            say(json.dumps(line, ensure_ascii=False))
    elif len(prompts) == 1:
        say(prompts[0], end="")
        writer.write(tokens[0])
    else:
        for prompt, line in zip(prompts, writer.lines(prompts, tokens), strict=True):
            say(f"{prompt}{line['text']}\n")
    return 0


def _prompts(args: argparse.Namespace) -> list[str]:
    if args.file is None:
        return args.prompt or [""]
    try:
        if args.file == "-":
            return [sys.stdin.read()]
        return [Path(args.file).read_text(encoding="utf-8")]
    except OSError as error:
        raise UserError(f"--file {args.file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--file {args.file} is no text in UTF-8: {error}") from error


def _converse(writer: Writer) -> int:
    """A line is a prompt; the end of the input, or an interrupt, ends it."""
    complain("a prompt a line; an empty one begins a document; Ctrl-D ends")
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            say("")
            return 0
        try:
            tokens = writer.tokens(prompt)
        except UserError as error:
            complain(f"error: {error}")
            continue
        say(prompt, end="")
        writer.write(tokens)


class Writer(NamedTuple):
    """Writes texts of ``max_new_tokens`` at most with an opened model."""

    decoder: CachedDecoder
    tokenizer: Tokenizer
    sampling: Sampling
    max_new_tokens: int
    longest: int | None
    """Prompt, in tokens."""

    @classmethod
    def of(
        cls, opened: Opened, sampling: Sampling, max_new_tokens: int, any_length: bool
    ) -> Writer:
        if opened.tokenizer is None:
            raise UserError(
                f"{opened.path} has no tokenizer (data.tokenizer.kind is none): it was trained on "
                "tokens, and there is no text without one"
            )
        longest = None if any_length else opened.config.train.seq_length
        decoder = CachedDecoder.of(opened.chunk)
        return cls(decoder, opened.tokenizer, sampling, max_new_tokens, longest)

    def tokens(self, prompt: str) -> list[int]:
        return prompt_tokens(self.tokenizer, prompt, self.longest)

    def write(self, prompt: list[int]) -> None:
        """The text after ``prompt`` on the screen, a piece at a time; how fast on stderr."""
        stream, end = TextStream(self.tokenizer, prompt), self.tokenizer.eod
        started, count, token = time.perf_counter(), 0, -1
        for _, token in generate(
            self.decoder,
            [prompt],
            self.sampling,
            self.max_new_tokens,
            end,
            self.tokenizer.vocab_size,
        ):
            count += 1
            piece = stream.add(token) if token != end else ""
            if say(piece, end="") is not None:  # its reader has seen enough
                return
        seconds = time.perf_counter() - started
        say(stream.end())
        how = "to the end of the document" if token == end else "cut there"
        complain(f"[{count} tokens, {how}; {count / seconds:.0f} tokens/s]")

    def lines(self, prompts: list[str], tokens: list[list[int]]) -> list[dict[str, object]]:
        """What became of each prompt, for JSON."""
        texts = complete(self.decoder, self.tokenizer, tokens, self.sampling, self.max_new_tokens)
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
