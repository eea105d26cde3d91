"""Command line: `attnres-train COMMAND`, the same as `python -m attnres_train COMMAND`.

Commands import what they need when they run, so that `--help` is instant.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from keyword import iskeyword
from types import ModuleType

from attnres_train import __version__
from attnres_train.errors import UserError
from attnres_train.planning.machine import add_arguments as add_plan_arguments


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="attnres-train",
        description="Pretrain language models with Attention Residuals.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text)

    def add_overrides(command: argparse.ArgumentParser) -> None:
        command.add_argument(
            "overrides", metavar="KEY=VALUE", nargs="*", help="e.g. train.train_iters=20"
        )

    def add_configured(name: str, text: str) -> argparse.ArgumentParser:
        command = add(name, text)
        command.add_argument("config", metavar="CONFIG", help="YAML file of the run")
        add_overrides(command)
        return command

    command = add_configured("train", "Train, or resume, the run of a config.")
    command.add_argument(
        "--nproc", type=int, metavar="N", help="local processes (default: what the config needs)"
    )
    command = add_configured("plan", "What a layout sends, stores and costs; no workers.")
    add_plan_arguments(command)
    add_configured("data", "Build tokenizer and token shards of a config, once.")
    add_configured("config", "Check a config and print it with its derived values.")
    add("schema", "Print the JSON schema of the config, for editors.")
    command = add("report", "Summarise a run folder.")
    command.add_argument(
        "run_or_config", metavar="RUN", help="run folder, e.g. runs/quickstart, or its config"
    )
    command.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="of a config")
    command = add("export", "Write a run's weights in the layout of the released models.")
    command.add_argument("run_folder", metavar="RUN", help="run folder, or one of its step folders")
    command.add_argument("target", metavar="DIR", help="new folder for safetensors and config.json")
    command = add("import", "Make weights in the released layout step 0 of a run.")
    command.add_argument("source", metavar="DIR", help="folder with safetensors and config.json")
    command.add_argument("config", metavar="RUN", help="YAML file of the run, or run folder")
    add_overrides(command)
    add("doctor", "Show what is installed, what is used, and what a lack costs.")
    return parser


def command_module(name: str) -> ModuleType:
    """The module of command ``name``, which has ``run(args)``; its exit code is the process's."""
    file = f"{name}_" if iskeyword(name) else name
    return importlib.import_module(f"attnres_train.commands.{file}")


def main(arguments: list[str] | None = None) -> int:
    parser = build_parser()
    args, rest = parser.parse_known_args(arguments)
    # argparse takes no KEY=VALUE behind an option; they belong to the overrides all the same.
    if not hasattr(args, "overrides") or any("=" not in r or r.startswith("-") for r in rest):
        rest and parser.error(f"unrecognized arguments: {' '.join(rest)}")
    else:
        args.overrides += rest
    try:
        return command_module(args.command).run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
