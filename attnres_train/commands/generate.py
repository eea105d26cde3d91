"""`attnres-train generate RUN`: text from a run's model, on the screen as it comes."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from attnres_train.commands import spread
from attnres_train.errors import UserError
from attnres_train.inference.decoding import Decoder
from attnres_train.inference.opening import Saved
from attnres_train.inference.sampling import Sampling
from attnres_train.inference.writer import Writer
from attnres_train.screen import say


def run(args: argparse.Namespace) -> int:
    return spread.run(
        args,
        check=lambda: _check(args),
        prepare=lambda saved: Task.of(args, saved).write,
        # bf16 rounds more than it saves where there is no hardware for it.
        cpu_dtype=torch.float32,
        patience=spread.THINKING if args.interactive else None,
    )


def _check(args: argparse.Namespace) -> None:
    """Raises UserError for options that cannot be."""
    _sampling(args)
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {args.max_new_tokens}: it is at least 1")
    if args.interactive and args.json:
        raise UserError("--interactive is a conversation: leave out --json")


def _sampling(args: argparse.Namespace) -> Sampling:
    return Sampling(args.temperature, args.top_p, args.top_k, args.seed)


class Task(NamedTuple):
    """What is to be written: after ``prompts``, of the given ``tokens``, or as they come."""

    writer: Writer
    prompts: list[str]
    tokens: list[list[int]]
    interactive: bool
    as_json: bool

    @classmethod
    def of(cls, args: argparse.Namespace, saved: Saved) -> Task:
        """Raises UserError for prompts that cannot be taken, and without a tokenizer."""
        tokenizer = saved.tokenizer()
        if tokenizer is None:
            raise UserError(
                f"{saved.path} has no tokenizer (data.tokenizer.kind is none): it was trained on "
                "tokens, and there is no text without one"
            )
        longest = None if args.any_length else saved.config.train.seq_length
        writer = Writer(tokenizer, _sampling(args), args.max_new_tokens, longest)
        prompts = [] if args.interactive else _prompts(args)
        tokens = [writer.tokens(prompt) for prompt in prompts]
        return cls(writer, prompts, tokens, args.interactive, args.json)

    def write(self, decoder: Decoder) -> None:
        """Write all of it."""
        try:
            self._write(decoder)
        except KeyboardInterrupt:
            say("")  # what is told of it has a line of its own
            raise

    def _write(self, decoder: Decoder) -> None:
        if self.interactive:
            self.writer.converse(decoder)
        elif self.as_json:
            for line in self.writer.lines(decoder, self.prompts, self.tokens):
                say(json.dumps(line, ensure_ascii=False))
        elif len(self.prompts) == 1:
            say(self.prompts[0], end="")
            self.writer.write(decoder, self.tokens[0])
        else:
            lines = self.writer.lines(decoder, self.prompts, self.tokens)
            for prompt, line in zip(self.prompts, lines, strict=True):
                say(f"{prompt}{line['text']}\n")


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
