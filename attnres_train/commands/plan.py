"""`attnres-train plan`: what a layout sends, stores and costs, before any worker starts."""

from __future__ import annotations

import argparse
import gc
import json
from dataclasses import asdict
from pathlib import Path

from attnres_train.config import check_config, load_config
from attnres_train.config.schema import RunConfig
from attnres_train.config.stages import called, stage_configs
from attnres_train.errors import UserError
from attnres_train.planning.machine import Machine
from attnres_train.planning.planner import Planner
from attnres_train.planning.text import as_text


def run(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    check_config(config, args.nproc, files=False)
    return print_plan(config, args)


def print_plan(config: RunConfig, args: argparse.Namespace) -> int:
    """Print the plan of a checked ``config``, of each stage if it has some; ``args`` as of
    `machine`. Raises UserError for rates that are not positive and for a picture that cannot be
    written."""
    machine = Machine(args.flops_rate, args.peak_flops, args.link_bandwidth)
    for name, value in asdict(machine).items():
        if not value > 0:
            raise UserError(f"--{name.replace('_', '-')} is {value:g}: it must be above 0")
    gc.disable()  # a million small tuples and no cycles: looking for them takes half the time
    try:
        planners = [Planner(stage, machine, args.nproc) for stage in stage_configs(config)]
        reports = [planner.report() for planner in planners]
    finally:
        gc.enable()
    names = [stage.name for stage in config.stages]
    if args.json:
        by_name = {"stages": dict(zip(names, reports, strict=True))} if names else reports[0]
        print(json.dumps(by_name))
    for number, report in enumerate([] if args.json else reports):
        heading = f"{called(config, number)}\n\n" if names else ""
        print(("\n\n" if number else "") + heading + as_text(report))
    if args.picture:
        place = Path(args.picture)
        files = [place.with_stem(f"{place.stem}-{name}") for name in names] or [place]
        for file, planner in zip(files, planners, strict=True):
            _write(file, planner.picture(args.mode))
    return 0


def _write(path: Path, svg: str) -> None:
    try:
        path.write_text(svg, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--picture {path}: {error.strerror}") from error
