"""`attnres-train plan`: what a layout sends, stores and costs, before any worker starts; or the
best layout on a number of devices."""

from __future__ import annotations

import argparse
import gc
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from attnres_train.config import check_config, load_config, shipped
from attnres_train.config.loader import plain_values
from attnres_train.config.schema import RunConfig
from attnres_train.config.stages import called, stage_configs
from attnres_train.config.tree import Tree, parse_override, read_tree
from attnres_train.errors import UserError
from attnres_train.planning.devices import find_device
from attnres_train.planning.grids import ALONE
from attnres_train.planning.machine import SEARCH_OPTIONS, Machine
from attnres_train.planning.planner import Planner
from attnres_train.planning.shapes import check_suffix
from attnres_train.planning.text import as_text


def run(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    if args.gpus is not None:
        return print_advice(config, args)
    for option in SEARCH_OPTIONS:
        if getattr(args, option) is not None:
            raise UserError(f"--{option} is of a search: add --gpus N, the number of devices")
    check_config(config, args.nproc, files=False)
    return print_plan(config, args)


def print_advice(config: RunConfig, args: argparse.Namespace) -> int:
    """Print the best grids of ``config`` on ``args.gpus`` devices, and write the first of them
    where ``args.yaml`` says. Raises UserError where there is none, or an option makes no sense."""
    for option in ("nproc", "picture", "window"):
        if getattr(args, option) is not None:
            raise UserError(f"--{option} is of one layout, and --gpus searches them: leave one out")
    check_config(ALONE.of(config), None, files=False)
    device = find_device(args.device or "h100", args.assume or [])
    target = Path(args.yaml) if args.yaml else None
    source = shipped.find(args.config)
    if target and target.resolve() == source.resolve():
        raise UserError(f"--yaml {target} is the config itself: name another file")
    # Imported here: what is wrong with the options is told before torch is loaded.
    from attnres_train.planning import advice, search, stage_advice, stage_search

    base = str(source) if source.is_file() else args.config
    where = base, target.parent if target else Path(), _given(config, source, args.overrides)
    if config.stages:
        together = stage_search.search_stages(config, args.gpus, device)
        report, yaml = stage_advice.as_report(together), stage_advice.as_yaml(together, *where)
        told = stage_advice.as_text(report, yaml)
    else:
        found = search.search(config, args.gpus, device)
        report, yaml = advice.as_report(found), advice.as_yaml(found, *where)
        told = advice.as_text(report, yaml)
    print(json.dumps(report | {"yaml": yaml}) if args.json else told)
    if target:
        try:
            target.write_text(yaml, encoding="utf-8")
        except OSError as error:
            raise UserError(f"--yaml {target}: {error.strerror}") from error
    return 0


def _given(config: RunConfig, source: Path, overrides: list[str]) -> dict[str, Any]:
    """What ``overrides`` set, nested as in a file; of a list all elements. With `stages`, if there
    are some, as they are written in ``source``."""
    values, given = plain_values(config), Tree({}, {})
    if config.stages:
        written = read_tree(source)
        for text in overrides:
            written.merge(parse_override(text))
        values["stages"] = given.values["stages"] = written.values["stages"]
    for text in overrides:
        keys = text.partition("=")[0].strip().split(".")
        path = keys[: next((n for n, key in enumerate(keys) if key.isdigit()), len(keys))]
        value: Any = values
        for key in path:
            value = value[key]
        for key in reversed(path):
            value = {key: value}
        given.merge(Tree(value, {}))
    return given.values


def print_plan(config: RunConfig, args: argparse.Namespace) -> int:
    """Print the plan of a checked ``config``, of each stage if it has some; ``args`` as of
    `machine`. Raises UserError for rates that are not positive and for a picture that cannot be
    written."""
    machine = Machine(args.flops_rate, args.peak_flops, args.link_bandwidth)
    for name, value in asdict(machine).items():
        if not value > 0:
            raise UserError(f"--{name.replace('_', '-')} is {value:g}: it must be above 0")
    if args.picture:
        check_suffix(Path(args.picture), "--picture")
    elif args.window:
        raise UserError("--window is of a picture: add --picture FILE.svg")
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
            planner.picture(args.mode, args.window).write(file, "--picture")
    return 0
