"""Where a run stands among its stages, and what of a checkpoint is the present stage's.

A stage is a run that begins with another's weights, optimizer, count of steps and tokens: with
sample 0 of its own data, at step 1 of its own schedule. It begins with the first step after the
last one of the stage before, so that a checkpoint of that one is where either begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from attnres_train.config.loader import plain_values
from attnres_train.config.resume_table import EFFECTS, TOLD, changes
from attnres_train.config.saved import upgraded
from attnres_train.config.schema import RunConfig
from attnres_train.config.stage_values import stage_values
from attnres_train.config.stages import called, named, stage_configs
from attnres_train.errors import UserError
from attnres_train.runs.progress import Progress


def entered(config: RunConfig, progress: Progress) -> Progress:
    """``progress``, in the stage whose step comes next. Raises UserError where that is not in
    ``config``."""
    stages = stage_configs(config)
    if progress.stage >= len(stages):
        raise UserError(
            f"stages: the run is at step {progress.step}, in stage {progress.stage + 1}, but there "
            f"{'is' if len(stages) == 1 else 'are'} {len(stages)}: put back what is missing"
        )
    end = progress.began + stages[progress.stage].train.train_iters
    if progress.step != end or progress.stage + 1 == len(stages):
        return progress
    # Its data are others: their losses are compared among themselves.
    spikes = replace(progress.spikes, recent=[], since=0)
    number = progress.stage + 1
    return replace(progress, stage=number, began=progress.step, samples=0, spikes=spikes)


def begins(progress: Mapping[str, Any]) -> bool:
    """Whether a plain `Progress` is at the beginning of a stage that is not the first."""
    return bool(progress.get("stage")) and progress["step"] == progress["began"]


def seen_from(
    config: RunConfig, path: Path, extras: Mapping[str, Any], start: Progress | None = None
) -> tuple[RunConfig, dict[str, Any]]:
    """The configuration of the stage that the run goes on with from checkpoint ``path``, and
    ``extras`` as of that stage: ``progress``, the ``config`` that it was to have, the record of its
    ``data`` as far as there is one. Those of stages that are over are in ``past``. ``start`` is
    where another run begins with it.

    Raises UserError where a stage that is over is another in ``config``.
    """
    before = Progress.of(extras["progress"])
    now = entered(config, start or before)
    seen = {**extras, "progress": now.plain()}
    if "config" in extras:
        values = upgraded(extras["config"])
        if start is None:
            _check_past(config, path, values, now)
        planned = len(values.get("stages") or [0])
        seen["config"] = stage_values(values, min(now.stage, planned - 1))
    if start is not None:
        seen.pop("past", None)  # the other run's
    elif now.stage != before.stage and "data" in extras:
        over = {"stage": before.stage, "until_step": now.step, **extras["data"]}
        seen["past"] = [*extras.get("past", []), over]
        seen["data"] = {"tokenizer": extras["data"]["tokenizer"]}  # the one thing that is the same
    return stage_configs(config)[now.stage], seen


def _check_past(config: RunConfig, path: Path, before: dict[str, Any], now: Progress) -> None:
    after = plain_values(config)
    found = list(_renamed(before, after, now))
    for number in range(now.stage):
        for change in changes(stage_values(before, number), stage_values(after, number)):
            key = ".".join(step for step in change.key.split(".") if not step.isdigit())
            if f"stages.{key}" in EFFECTS and change.effect in TOLD:
                found.append(f"stages.{number}.{change}")
    if found:
        listing = "".join(f"\n  {one}" for one in found)
        raise UserError(
            f"{path} has other stages behind it than this configuration has:{listing}\nChange them "
            f"back: what is over cannot become another. What is to come is free: "
            f"stages.{now.stage}, and others after it, may have their own of every key of a stage"
        )


def _renamed(before: dict[str, Any], after: dict[str, Any], now: Progress) -> Iterator[str]:
    """Names tell stages apart: of those that have begun they stay."""
    begun = now.stage + (now.step > now.began)
    names = [[stage["name"] for stage in one.get("stages", [])] for one in (before, after)]
    if not all(names):
        return  # the run was one without stages until now
    for number, (old, new) in enumerate(list(zip(*names, strict=False))[:begun]):
        if old != new:
            yield f"stages.{number}.name {old} -> {new}"


def told_beginning(config: RunConfig, progress: Mapping[str, Any]) -> list[str]:
    """That a stage begins, where one does."""
    if not begins(progress):
        return []
    return [f"{called(config, progress['stage'])} begins, with sample 0 of its data"]


@contextmanager
def problems_named(config: RunConfig, number: int) -> Iterator[None]:
    """A UserError about stage ``number`` names the stage's own keys."""
    try:
        yield
    except UserError as error:
        if not config.stages:
            raise
        raise UserError(named(config, number, str(error))) from error
