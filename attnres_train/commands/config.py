"""`attnres-train config`: check a config, print its derived values."""

from __future__ import annotations

import argparse

from attnres_train.config import check_config, describe, load_config
from attnres_train.planning.build import chunk_layers


def run(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    check_config(config, None)
    print(describe(config, chunk_layers(config)))
    return 0
