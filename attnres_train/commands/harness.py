"""`attnres-train harness RUN --tasks ...`: tasks of EleutherAI's lm-evaluation-harness."""

from __future__ import annotations

import argparse
import json
from typing import Any

from attnres_train.commands.output import show
from attnres_train.errors import UserError


def run(args: argparse.Namespace) -> int:
    lm_eval = installed()
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    from attnres_train.evaluation.harness import HarnessModel

    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit is {args.limit}: it must be 1 or more")
    manager = TaskManager(include_path=args.include_path)
    if unknown := [name for name in args.tasks if not manager.match_tasks([name])]:
        where = f" and {args.include_path}" if args.include_path else ""
        raise UserError(f"--tasks {' '.join(unknown)}: no such task in lm-eval{where}")
    model = HarnessModel(args.run_folder, args.device, args.batch_size, args.max_length)
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
    return 0


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
