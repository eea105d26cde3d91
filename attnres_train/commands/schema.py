"""`attnres-train schema`: the JSON schema of the config, for editors."""

from __future__ import annotations

import argparse
import json

from attnres_train.config import json_schema


def run(args: argparse.Namespace) -> int:
    print(json.dumps(json_schema(), indent=2))
    return 0
