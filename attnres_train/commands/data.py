"""`attnres-train data`: build tokenizer and token shards beforehand."""

from __future__ import annotations

import argparse

from attnres_train.config import check_config, load_config


def run(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    check_config(config, None)
    # Imported here: a config that cannot run is told before torch is loaded.
    from attnres_train.runs.preparation import prepare_stages

    prepare_stages(config)
    return 0
