"""`attnres-train config`: check a config, print all of it and what follows from it."""

from __future__ import annotations

import argparse
import json
import textwrap

from attnres_train.commands.output import show
from attnres_train.config import check_config
from attnres_train.config.loader import as_yaml, load_with_places
from attnres_train.config.schema import RunConfig
from attnres_train.config.stages import called, stage_configs
from attnres_train.config.summary import as_lines, derived
from attnres_train.planning.build import chunk_layers


def run(args: argparse.Namespace) -> int:
    config, places = load_with_places(args.config, args.overrides)
    check_config(config, None, files=False)
    if args.derived and args.json:
        all_values = [everything_derived(stage) for stage in stage_configs(config)]
        names = [stage.name for stage in config.stages]
        by_name = {"stages": dict(zip(names, all_values, strict=True))} if names else all_values[0]
        show(json.dumps(by_name, indent=2))
    elif args.derived:
        show(_derived_lines(config))
    elif args.json:
        show(config.model_dump_json(indent=2))
    else:
        # What follows are comments: the output is a configuration that loads again.
        show(as_yaml(config, places) + "\n# What follows from it:")
        show(textwrap.indent(_derived_lines(config), "#   "))
    return 0


def _derived_lines(config: RunConfig) -> str:
    """What follows from ``config``, from each stage if it has some."""
    parts = []
    for number, stage in enumerate(stage_configs(config)):
        heading = f"{called(config, number)}\n" if config.stages else ""
        parts.append(heading + as_lines(everything_derived(stage)))
    return "\n\n".join(parts)


def everything_derived(config: RunConfig) -> dict[str, str]:
    """What follows from a checked ``config`` by arithmetic, by its model and on this machine."""
    # Imported here: a config that cannot run is told before torch is loaded.
    from attnres_train.parallel.ranks import choose_device
    from attnres_train.planning.facts import facts

    device = choose_device(config.train.device)
    return derived(config, chunk_layers(config)) | facts(config, device)
