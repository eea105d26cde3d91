"""`attnres-train study`: run a study, report what it has found, price it beforehand."""

from __future__ import annotations

import argparse
from pathlib import Path

from attnres_train.errors import UserError
from attnres_train.screen import complain, say
from attnres_train.study.queue import Queue
from attnres_train.study.slots import make_slots
from attnres_train.study.study_file import Study, load_study
from attnres_train.supervise.run_lock import run_lock
from attnres_train.supervise.signals import raised

ACTIONS = ("run", "report", "plan")
_OPTIONS = {
    "run": ("jobs",),
    "report": ("json", "plot", "html"),
    "plan": ("gpus", "device", "assume"),
}


def run(args: argparse.Namespace) -> int:
    words: list[str] = args.words
    action = words.pop(0) if words and words[0] in ACTIONS else "run"
    if not words:
        raise UserError("which study? Name its file: attnres-train study [report|plan] STUDY.yaml")
    for other, options in _OPTIONS.items():
        for option in options:
            if other != action and getattr(args, option) is not None:
                raise UserError(f"--{option} is of `study {other}`: leave it out")
    file, *overrides = words
    if action == "report":
        return _report(file, overrides, args)
    study = load_study(file, overrides, files=action == "run")
    return _plan(study, args) if action == "plan" else _run(study, args)


def _run(study: Study, args: argparse.Namespace) -> int:
    from attnres_train.study import results

    with raised(), run_lock(study.folder, "study", "study.name"):
        results.check_same(study)
        slots = make_slots([run.config for run in study.runs], args.jobs)
        queue = Queue(study, slots)
        queue.work()
    if queue.done:
        from attnres_train.study.analysis import Analysis
        from attnres_train.study.record import record_of
        from attnres_train.study.text import as_text

        say("\n" + as_text(Analysis(record_of(study))))
    for name, what in queue.failed.items():
        complain(f"{name} failed: {what}; its output: {study.folder / 'logs'}")
    return 1 if queue.failed else 0


def _report(file: str, overrides: list[str], args: argparse.Namespace) -> int:
    from attnres_train.study.analysis import Analysis
    from attnres_train.study.record import read_record, record_of, write_record
    from attnres_train.study.text import as_text

    if file.endswith(".json"):
        if overrides:
            raise UserError(f"{overrides[0]}: of a record nothing is to be changed: leave it out")
        record = read_record(Path(file))
    else:
        study = load_study(file, overrides, files=False)
        from attnres_train.study import results

        results.check_same(study)
        record = record_of(study)
    analysis = Analysis(record)
    say(as_text(analysis))
    if args.json is not None:
        write_record(record, Path(args.json))
    if args.plot is not None:
        from attnres_train.study.plot import draw

        draw(analysis, Path(args.plot))
    if args.html is not None:
        from attnres_train.reports.document import write_document
        from attnres_train.study.page import page

        write_document(Path(args.html), page(analysis))
    return 0


def _plan(study: Study, args: argparse.Namespace) -> int:
    from attnres_train.planning.devices import find_device

    device = find_device(args.device or "h100", args.assume or [])
    gpus = 1 if args.gpus is None else args.gpus
    from attnres_train.study.price import as_text, prices

    found = prices(study, gpus, device, lambda name: complain(f"plan: {name}"))
    say(as_text(study, found, gpus, device))
    return 0
