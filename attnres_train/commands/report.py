"""`attnres-train report RUN [RUN ...]`: what runs did, from the files in their folders."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

from attnres_train.command_line.parser import CommandParser
from attnres_train.commands.output import show
from attnres_train.config import load_config
from attnres_train.config.meant import check_words, is_override
from attnres_train.config.saved import load_saved
from attnres_train.config.shipped import names
from attnres_train.errors import UserError
from attnres_train.reports.differences import differences
from attnres_train.reports.document import write_document
from attnres_train.reports.measures import measures
from attnres_train.reports.page import page
from attnres_train.reports.plot import draw_plot, save_pictures
from attnres_train.reports.reading import Run, read_runs
from attnres_train.reports.summary import summary
from attnres_train.reports.table import as_text


def run(args: argparse.Namespace) -> int:
    runs = read_runs(_folders([args.run_or_config, *args.words], args.parser))
    if len(runs) == 1 and not runs[0].records:
        raise UserError(
            f"{runs[0].folder} holds no run: config.yaml and metrics.jsonl are needed, of a run "
            "that has made a step"
        )
    if args.plot:
        draw_plot(runs, Path(args.plot))
    if args.pictures:
        save_pictures(runs, Path(args.pictures))
    if args.html:
        write_document(Path(args.html), page(runs))
    if args.json:
        show(as_json(runs))
    elif len(runs) == 1:
        show(as_summary(runs[0]))
    else:
        show(as_text([measures(one) for one in runs], differences(runs)))
    return 0


def _folders(words: list[str], parser: CommandParser) -> list[Path]:
    """The run folders that ``words`` name, or configs do under the overrides among the words.
    Raises UserError where nothing is known by a name."""
    overrides = [w for w in words if is_override(w) and not Path(w).is_dir()]
    named = [word for word in words if word not in overrides]
    if any(word.startswith("-") for word in named):
        # With what may be their values.
        strange = [w for before, w in pairwise(["", *named]) if "-" in (before[:1], w[:1])]
        unknown = check_words(strange, parser.options)
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    folders, configs = [], 0
    for word in named:
        if not Path(word).is_dir() and (word.endswith((".yaml", ".yml")) or word in names()):
            section = load_config(word, overrides).run
            folders.append(Path(section.dir) / section.name)
            configs += 1
        else:
            folders.append(Path(word))
    if overrides and not configs:
        raise UserError(
            f"{overrides[0]}: {named[0]} is taken for a run folder, of which there is nothing "
            "to change: leave it out, or name a config"
        )
    return folders


def as_summary(run: Run) -> str:
    """Of one run that has records. Raises UserError where its configuration is missing, or names
    a class of the user's that is."""
    config = run.folder / "config.yaml"
    if not config.is_file():
        raise UserError(f"{run.folder} holds no run: config.yaml and metrics.jsonl are needed")
    rows = summary(load_saved(config), run.records, run.info, run.folder)
    return "\n".join(f"{label:>12}  {text}" for label, text in rows)


def as_json(runs: list[Run]) -> str:
    """The measures of each, and what sets them apart."""
    found = [asdict(measures(one)) for one in runs]
    plain = [{k: _plain(v) for k, v in one.items()} for one in found]
    between = [asdict(one) for one in differences(runs)]
    return json.dumps({"runs": plain, "differences": between}, indent=2, allow_nan=False)


def _plain(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
