"""`attnres-train plan`: what a layout sends, stores and costs, before any worker starts."""

from __future__ import annotations

import argparse
import gc
import json
from dataclasses import asdict
from pathlib import Path

from attnres_train.config import check_config, load_config
from attnres_train.config.schema import RunConfig
from attnres_train.errors import UserError
from attnres_train.planning.machine import Machine
from attnres_train.planning.planner import Planner
from attnres_train.planning.text import as_text


def run(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    check_config(config, args.nproc, files=False)
    return print_plan(config, args)


def print_plan(config: RunConfig, args: argparse.Namespace) -> int:
    """Print the plan of a checked ``config``; ``args`` as of `machine`. Raises UserError for
    rates that are not positive and for a picture that cannot be written."""
    machine = Machine(args.flops_rate, args.peak_flops, args.link_bandwidth)
    for name, value in asdict(machine).items():
        if not value > 0:
            raise UserError(f"--{name.replace('_', '-')} is {value:g}: it must be above 0")
    gc.disable()  # a million small tuples and no cycles: looking for them takes half the time
    try:
        planner = Planner(config, machine, args.nproc)
        report = planner.report()
    finally:
        gc.enable()
    print(json.dumps(report) if args.json else as_text(report))
    if args.picture:
        _write(Path(args.picture), planner.picture(args.mode))
    return 0


def _write(path: Path, svg: str) -> None:
    try:
        path.write_text(svg, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--picture {path}: {error.strerror}") from error
