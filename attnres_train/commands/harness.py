"""`attnres-train harness RUN --tasks ...`: tasks of EleutherAI's lm-evaluation-harness."""

from __future__ import annotations

import argparse
import json
from typing import Any

from attnres_train.commands import spread
from attnres_train.commands.output import show
from attnres_train.errors import UserError
from attnres_train.inference.decoding import Reader
from attnres_train.inference.opening import Saved


def run(args: argparse.Namespace) -> int:
    installed()
    # What follows --tasks on the line are tasks to argparse, keys of the grid too.
    args.overrides += [word for word in args.tasks if "=" in word]
    args.tasks = [word for word in args.tasks if "=" not in word]
    return spread.run(
        args,
        check=lambda: _check(args),
        prepare=lambda saved: _prepared(args, saved),
        patience=spread.THINKING,
    )


def installed() -> Any:
    """The package lm_eval. Raises UserError where it is not there."""
    try:
        import lm_eval
    except ImportError as error:
        raise UserError(
            f"harness needs lm-eval, which cannot be imported ({error}): pip install "
            "'attnres-train[eval]'"
        ) from error
    return lm_eval


def _check(args: argparse.Namespace) -> None:
    """Raises UserError for options that cannot be."""
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit is {args.limit}: it must be 1 or more")
    manager = _manager(args)
    if unknown := [name for name in args.tasks if not manager.match_tasks([name])]:
        where = f" and {args.include_path}" if args.include_path else ""
        raise UserError(f"--tasks {' '.join(unknown)}: no such task in lm-eval{where}")


def _manager(args: argparse.Namespace) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=args.include_path)


def _prepared(args: argparse.Namespace, saved: Saved) -> spread.Work:
    from attnres_train.evaluation.harness import HarnessModel, text_tokenizer

    text_tokenizer(saved)  # before anything is loaded
    path, size, length = str(saved.path), args.batch_size, args.max_length

    def work(reader: Reader) -> None:
        _evaluate(args, HarnessModel(path, None, size, length, reader=reader))

    return work


def _evaluate(args: argparse.Namespace, model: Any) -> None:
    lm_eval = installed()
    from lm_eval.utils import make_table

    results = lm_eval.simple_evaluate(
        model=model,
        tasks=args.tasks,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        task_manager=_manager(args),
        bootstrap_iters=0 if args.limit else 1000,
    )
    if args.json:
        show(json.dumps(results["results"], indent=2, default=str))
    else:
        show(make_table(results))
