"""What a study costs before it is run: GPU hours, by the planner's best grid for each of its runs.

All predicted: devices attain what `planning.devices` assumes, and FLOPs, bytes and launches are
counted; `--assume` changes what is assumed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from attnres_train.config.loader import plain_values
from attnres_train.config.schema import RunConfig
from attnres_train.config.stages import stage_configs
from attnres_train.errors import UserError
from attnres_train.planning.devices import Device
from attnres_train.planning.search import search
from attnres_train.planning.text import table
from attnres_train.study.study_file import Study, elsewhere

_FREE = ("run", "optimizer", "lr_schedule", "data", "checkpoint", "log")
"""Sections that a step's time hardly depends on: runs that differ in them alone are priced once."""


@dataclass(frozen=True)
class Price:
    name: str
    """Of the first run of its kind."""
    runs: int
    tokens: int
    """Of a run."""
    step_seconds: float
    hours: float
    """Of a run, times its devices."""
    mfu: float


def prices(
    study: Study, gpus: int, device: Device, told: Callable[[str], None] = lambda name: None
) -> list[Price]:
    """Of each run that is like no other, on ``gpus`` devices. Raises UserError, naming the run,
    where no grid fits."""
    alike: dict[str, list[int]] = {}
    for number, run in enumerate(study.runs):
        alike.setdefault(_shape(run.config), []).append(number)
    found = []
    for numbers in alike.values():
        run = study.runs[numbers[0]]
        told(run.name)
        seconds = tokens = mfu = 0.0
        for stage in stage_configs(elsewhere(run.config)):
            try:
                best = search(stage, gpus, device, shown=1)
            except UserError as error:
                raise UserError(f"run {run.name}: {error}") from error
            (grid,) = best.best
            step, train = best.steps[grid], stage.train
            seconds += step.seconds * train.train_iters
            tokens += train.train_iters * train.global_batch_size * train.seq_length
            mfu = best.estimator.mfu(grid, step.seconds)
        hours = seconds * gpus / 3600
        each = seconds / run.config.total_iters
        found.append(Price(run.name, len(numbers), int(tokens), each, hours, mfu))
    return found


def _shape(config: RunConfig) -> str:
    values = plain_values(config)
    return json.dumps({key: value for key, value in values.items() if key not in _FREE})


def as_text(study: Study, found: list[Price], gpus: int, device: Device) -> str:
    total = sum(price.runs * price.hours for price in found)
    rows = [
        [
            price.name,
            price.runs,
            f"{price.tokens / 1e6:,.1f}",
            f"{price.step_seconds:.3f}",
            f"{100 * price.mfu:.1f}",
            f"{price.hours:,.2f}",
            f"{price.runs * price.hours:,.2f}",
        ]
        for price in found
    ]
    header = ["first of its kind", "runs", "Mtokens", "s/step", "MFU %", "hours each", "hours"]
    title = (
        f"study {study.settings.study.name}: {len(study.runs)} runs, each on {gpus} x "
        f"{device.name}: predicted {total:,.2f} device hours, without validation and start"
    )
    return table(title, header, rows, left=1)
