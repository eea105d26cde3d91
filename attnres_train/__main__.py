"""Command line: `attnres-train COMMAND`, the same as `python -m attnres_train COMMAND`.

Commands import what they need when they run, so that `--help` is instant.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from attnres_train import __version__
from attnres_train.errors import UserError
from attnres_train.planning.machine import add_arguments as add_plan_arguments


def train(args: argparse.Namespace) -> int:
    from attnres_train.supervise.launcher import run_worker

    if "WORLD_SIZE" in os.environ:
        return run_worker(lambda: _work(args))
    return _launch(args)


def _work(args: argparse.Namespace) -> int:
    """Be one of the processes that a launcher has started."""
    from attnres_train.config import check_config, load_config

    config = load_config(args.config, args.overrides)
    check_config(config, int(os.environ["WORLD_SIZE"]))
    from attnres_train.train import train as train_worker

    return train_worker(config)


def _launch(args: argparse.Namespace) -> int:
    """Start the processes of the run on this machine, once nothing speaks against it."""
    from attnres_train.config import check_config, load_config
    from attnres_train.supervise.launcher import default_world_size, launch, prepare_local

    config = load_config(args.config, args.overrides)
    check_config(config, args.nproc)
    world_size = args.nproc or default_world_size(config)
    check_config(config, world_size)
    prepare_local(config)
    command = ["-m", "attnres_train", "train", args.config, *args.overrides]
    return launch(command, world_size, Path(config.run.dir) / config.run.name)


def data(args: argparse.Namespace) -> int:
    from attnres_train.config import check_config, load_config
    from attnres_train.data.prepare import prepare

    config = load_config(args.config, args.overrides)
    check_config(config, None)
    prepare(config)
    return 0


def config(args: argparse.Namespace) -> int:
    from attnres_train.config import check_config, describe, load_config
    from attnres_train.planning.build import chunk_layers

    run_config = load_config(args.config, args.overrides)
    check_config(run_config, None)
    print(describe(run_config, chunk_layers(run_config)))
    return 0


def plan(args: argparse.Namespace) -> int:
    from attnres_train.config import check_config, load_config
    from attnres_train.planning.planner import run

    run_config = load_config(args.config, args.overrides)
    check_config(run_config, args.nproc)
    return run(run_config, args)


def schema(args: argparse.Namespace) -> int:
    import json

    from attnres_train.config import json_schema

    print(json.dumps(json_schema(), indent=2))
    return 0


def report(args: argparse.Namespace) -> int:
    from attnres_train.commands.report import report as print_report
    from attnres_train.config import load_config

    folder = args.run_or_config
    if folder.endswith((".yaml", ".yml")):
        run = load_config(folder, args.overrides).run
        folder = os.path.join(run.dir, run.name)
    return print_report(folder)


def export(args: argparse.Namespace) -> int:
    from attnres_train.commands.weights import export_weights

    return export_weights(args.run_folder, args.target)


def import_(args: argparse.Namespace) -> int:
    from attnres_train.commands.weights import import_weights

    return import_weights(args.source, args.config, args.overrides)


def doctor(args: argparse.Namespace) -> int:
    from attnres_train.commands.doctor import doctor as print_doctor

    return print_doctor()


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="attnres-train",
        description="Pretrain language models with Attention Residuals.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        return command

    def add_overrides(command: argparse.ArgumentParser) -> None:
        command.add_argument(
            "overrides", metavar="KEY=VALUE", nargs="*", help="e.g. train.train_iters=20"
        )

    def add_configured(name: str, run, text: str) -> argparse.ArgumentParser:
        command = add(name, run, text)
        command.add_argument("config", metavar="CONFIG", help="YAML file of the run")
        add_overrides(command)
        return command

    command = add_configured("train", train, "Train, or resume, the run of a config.")
    command.add_argument(
        "--nproc", type=int, metavar="N", help="local processes (default: what the config needs)"
    )
    command = add_configured("plan", plan, "What a layout sends, stores and costs; no workers.")
    add_plan_arguments(command)
    add_configured("data", data, "Build tokenizer and token shards of a config, once.")
    add_configured("config", config, "Check a config and print it with its derived values.")
    add("schema", schema, "Print the JSON schema of the config, for editors.")
    command = add("report", report, "Summarise a run folder.")
    command.add_argument(
        "run_or_config", metavar="RUN", help="run folder, e.g. runs/quickstart, or its config"
    )
    command.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="of a config")
    command = add("export", export, "Write a run's weights in the layout of the released models.")
    command.add_argument("run_folder", metavar="RUN", help="run folder, or one of its step folders")
    command.add_argument("target", metavar="DIR", help="new folder for safetensors and config.json")
    command = add("import", import_, "Make weights in the released layout step 0 of a run.")
    command.add_argument("source", metavar="DIR", help="folder with safetensors and config.json")
    command.add_argument("config", metavar="RUN", help="YAML file of the run, or run folder")
    add_overrides(command)
    add("doctor", doctor, "Show what is installed, what is used, and what a lack costs.")
    return parser


def main(arguments: list[str] | None = None) -> int:
    parser = build_parser()
    args, rest = parser.parse_known_args(arguments)
    # argparse takes no KEY=VALUE behind an option; they belong to the overrides all the same.
    if not hasattr(args, "overrides") or any("=" not in r or r.startswith("-") for r in rest):
        rest and parser.error(f"unrecognized arguments: {' '.join(rest)}")
    else:
        args.overrides += rest
    try:
        return args.run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
