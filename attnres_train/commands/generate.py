"""`attnres-train generate RUN`: text from a run's model, on the screen as it comes; by one process,
or as one of those that share the model, or by starting these."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from attnres_train.config.errors import ConfigError
from attnres_train.config.schema import RunConfig, RunSection
from attnres_train.errors import UserError
from attnres_train.inference.decoding import CachedDecoder, Decoder
from attnres_train.inference.grid import on_grid
from attnres_train.inference.opening import Saved, choose, find_saved, open_model
from attnres_train.inference.opening_over_ranks import open_over_ranks
from attnres_train.inference.over_ranks import led_by_main
from attnres_train.inference.sampling import Sampling
from attnres_train.inference.writer import Writer
from attnres_train.parallel.launched import launched_world_size
from attnres_train.parallel.meeting import Meeting, meet
from attnres_train.parallel.ranks import join_run
from attnres_train.screen import say
from attnres_train.supervise.launcher import launch
from attnres_train.supervise.preflight import device_problems
from attnres_train.supervise.signals import heard, raised
from attnres_train.supervise.worker import run_worker

THINKING = timedelta(days=7)
"""How long the other ranks wait for the next prompt of a conversation."""


def run(args: argparse.Namespace) -> int:
    world_size = launched_world_size()
    if world_size is not None and world_size > 1:
        with heard(with_agent=True, keeps_nothing=True):
            return run_worker(lambda: _work(args, world_size))
    saved = _checked(args)
    _, count = on_grid(saved.config, args.overrides, world_size or args.nproc)
    if count > 1:
        with raised():
            return _launch(args, count)
    return _alone(args, saved)


def _checked(args: argparse.Namespace) -> Saved:
    """The checkpoint that is asked for. Raises UserError for options that cannot be."""
    _sampling(args)
    if args.nproc is not None and args.nproc < 1:
        raise UserError(f"--nproc is {args.nproc}: it is at least 1")
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {args.max_new_tokens}: it is at least 1")
    if args.interactive and args.json:
        raise UserError("--interactive is a conversation: leave out --json")
    return find_saved(args.run_folder)


def _sampling(args: argparse.Namespace) -> Sampling:
    return Sampling(args.temperature, args.top_p, args.top_k, args.seed)


def _alone(args: argparse.Namespace, saved: Saved) -> int:
    """Write with the whole model in this process."""
    task = Task.of(args, saved)
    on_cpu = choose(args.device).type == "cpu"
    # bf16 rounds more than it saves where there is no hardware for it.
    opened = open_model(saved.path, args.device, torch.float32 if on_cpu else None)
    task.write(CachedDecoder.of(opened.chunk))
    return 0


def _launch(args: argparse.Namespace, count: int) -> int:
    """Start ``count`` processes on this machine that share the model."""
    _check_device(args.device, count)
    command = ["-m", "attnres_train", *args.words_given]
    with tempfile.TemporaryDirectory(prefix="attnres-train-") as scratch:  # failures are told there
        return launch(command, count, Path(scratch))


def _check_device(device: str, local_processes: int | None) -> None:
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(
            f"--device {device}: of several processes each has its own: it is cpu, cuda or auto"
        )
    if problems := list(device_problems(device, local_processes, "--device")):
        raise ConfigError(problems)


def _work(args: argparse.Namespace, world_size: int) -> int:
    """Be one of ``world_size`` processes that share the model; rank 0 has the texts."""
    with meet(RunSection().start_timeout_seconds) as meeting:
        saved, config, task = _begin(args, meeting)
        with join_run(config, meeting) as ranks:
            on_cpu = ranks.device.type == "cpu"
            dtype = torch.float32 if on_cpu else None
            decoder = open_over_ranks(config, saved.path, ranks, dtype)
            if args.interactive:
                patient = dist.new_group(backend="gloo", timeout=THINKING)
                ranks = dataclasses.replace(ranks, control=patient)
            with led_by_main(decoder, ranks) as leading:
                if leading is not None and task is not None:
                    task.write(leading)
    return 0


def _begin(args: argparse.Namespace, meeting: Meeting) -> tuple[Saved, RunConfig, Task | None]:
    """The checkpoint that rank 0 has found, the configuration on this grid and, on rank 0, what is
    to be written. Raises UserError, on all ranks, for what is wrong on any. Collective."""
    task = None
    if meeting.rank == 0:
        saved = _checked(args)
        # Others might find a newer one already.
        meeting.tell("checkpoint", str(saved.path.absolute()))
    else:
        saved = find_saved(meeting.hear("checkpoint", "rank 0 to find the checkpoint"))
    config, _ = on_grid(saved.config, args.overrides, meeting.world_size)
    _check_device(args.device, None)
    train = config.train.model_copy(update={"device": args.device})
    config = config.model_copy(update={"train": train})
    meeting.tell_own("ready", True)
    if meeting.rank == 0:
        task = Task.of(args, saved)
        meeting.hear_all("ready", "to look at the checkpoint")
        meeting.tell("all ready", True)
    meeting.hear("all ready", "all ranks to look at the checkpoint")
    meeting.is_over = True
    return saved, config, task


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
