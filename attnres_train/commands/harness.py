"""`attnres-train harness RUN --tasks ...`: tasks of EleutherAI's lm-evaluation-harness."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from attnres_train.commands import spread
from attnres_train.commands.output import show
from attnres_train.errors import UserError
from attnres_train.inference.decoding import Reader
from attnres_train.inference.opening import Saved


def run(args: argparse.Namespace) -> int:
    # What follows --tasks on the line are tasks to argparse, keys of the grid too.
    args.overrides += [word for word in args.tasks if "=" in word]
    args.tasks = [word for word in args.tasks if "=" not in word]
    # It reads thousands of files: once, and on ranks that only share the model never.
    manager = cache(partial(_manager, args.include_path))
    return spread.run(
        args,
        check=lambda: _check(args, manager),
        prepare=lambda saved: _prepared(args, manager, saved),
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


def _check(args: argparse.Namespace, manager: Callable[[], Any]) -> None:
    """Raises UserError for options that cannot be."""
    installed()
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit is {args.limit}: it must be 1 or more")
    if not args.tasks:
        raise UserError("--tasks names keys alone, and no task")
    if unknown := [name for name in args.tasks if not manager().match_tasks([name])]:
        where = f" and {args.include_path}" if args.include_path else ""
        raise UserError(f"--tasks {' '.join(unknown)}: no such task in lm-eval{where}")


def _manager(include_path: str | None) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def _prepared(args: argparse.Namespace, manager: Callable[[], Any], saved: Saved) -> spread.Work:
    from attnres_train.evaluation.harness import HarnessModel, text_tokenizer

    text_tokenizer(saved)  # before anything is loaded
    path, size, length = str(saved.path), args.batch_size, args.max_length

    def work(reader: Reader) -> None:
        _evaluate(args, manager(), HarnessModel(path, None, size, length, reader=reader))

    return work


def _evaluate(args: argparse.Namespace, manager: Any, model: Any) -> None:
    lm_eval = installed()
    from lm_eval.utils import make_table

    results = lm_eval.simple_evaluate(
        model=model,
        tasks=args.tasks,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        task_manager=manager,
        bootstrap_iters=0 if args.limit else 1000,
    )
    if args.json:
        show(json.dumps(results["results"], indent=2, default=str))
    else:
        show(make_table(results))
