"""`attnres-train config`: check a config, print all of it and what follows from it."""

from __future__ import annotations

import argparse
import json
import textwrap

from attnres_train.commands.output import show
from attnres_train.config import check_config
from attnres_train.config.loader import as_yaml, load_with_places
from attnres_train.config.schema import RunConfig
from attnres_train.config.summary import as_lines, derived
from attnres_train.planning.build import chunk_layers


def run(args: argparse.Namespace) -> int:
    config, places = load_with_places(args.config, args.overrides)
    check_config(config, None, files=False)
    if args.derived:
        values = everything_derived(config)
        show(json.dumps(values, indent=2) if args.json else as_lines(values))
    elif args.json:
        show(config.model_dump_json(indent=2))
    else:
        # What follows are comments: the output is a configuration that loads again.
        show(as_yaml(config, places) + "\n# What follows from it:")
        show(textwrap.indent(as_lines(everything_derived(config)), "#   "))
    return 0


def everything_derived(config: RunConfig) -> dict[str, str]:
    """What follows from a checked ``config`` by arithmetic, by its model and on this machine."""
    # Imported here: a config that cannot run is told before torch is loaded.
    from attnres_train.parallel.ranks import choose_device
    from attnres_train.planning.facts import facts

    device = choose_device(config.train.device)
    return derived(config, chunk_layers(config)) | facts(config, device)
