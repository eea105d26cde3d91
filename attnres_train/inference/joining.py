"""A run's model opened by all processes that a launcher has started, of which one uses it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from attnres_train.config.schema import RunConfig, RunSection
from attnres_train.inference.decoding import Reader
from attnres_train.inference.grid import on_grid
from attnres_train.inference.opening import Saved, find_saved
from attnres_train.inference.opening_over_ranks import open_over_ranks
from attnres_train.inference.over_ranks import led_by_main
from attnres_train.parallel.meeting import Meeting, meet
from attnres_train.parallel.ranks import join_run

Prepared = TypeVar("Prepared")


@contextmanager
def join_model(
    path: str | Path,
    overrides: Sequence[str],
    device: str,
    prepare: Callable[[Saved], Prepared],
    *,
    check: Callable[[], None] = lambda: None,
    cpu_dtype: torch.dtype | None = None,
    patience: timedelta | None = None,
) -> Iterator[tuple[Prepared, Reader] | None]:
    """The model in ``path``, a run or step folder, over the processes of a launcher, on the grid of
    ``overrides`` (`grid.on_grid`). Rank 0 gets what ``prepare`` has made of the checkpoint, before
    anything is loaded, and the model; all others get None, once rank 0 is done with it.

    ``device`` is ``auto``, ``cpu`` or ``cuda``, ``cpu_dtype`` that of arithmetic on the CPU (None:
    as in training). Ranks wait for what rank 0 does between two calls up to ``patience`` (None: as
    for each other in training). Raises UserError, on all ranks, for what is wrong on any;
    ``check``, asked on each, may. Collective.
    """
    with meet(RunSection().start_timeout_seconds) as meeting:
        saved, config, prepared = _begin(path, overrides, device, prepare, check, meeting)
        with join_run(config, meeting) as ranks:
            dtype = cpu_dtype if ranks.device.type == "cpu" else None
            reader = open_over_ranks(config, saved.path, ranks, dtype)
            if patience is not None:
                patient = dist.new_group(backend="gloo", timeout=patience)
                ranks = dataclasses.replace(ranks, control=patient)
            with led_by_main(reader, ranks) as leading:
                yield None if leading is None else (cast("Prepared", prepared), leading)


def _begin(
    path: str | Path,
    overrides: Sequence[str],
    device: str,
    prepare: Callable[[Saved], Prepared],
    check: Callable[[], None],
    meeting: Meeting,
) -> tuple[Saved, RunConfig, Prepared | None]:
    """The checkpoint that rank 0 has found, the configuration on this grid and what rank 0 has
    prepared."""
    prepared = None
    if meeting.rank == 0:
        saved = find_saved(path)
        # Others might find a newer one already.
        meeting.tell("checkpoint", str(saved.path.absolute()))
    else:
        saved = find_saved(meeting.hear("checkpoint", "rank 0 to find the checkpoint"))
    config, _ = on_grid(saved.config, overrides, meeting.world_size)
    check()
    train = config.train.model_copy(update={"device": device})
    config = config.model_copy(update={"train": train})
    meeting.tell_own("ready", True)
    if meeting.rank == 0:
        prepared = prepare(saved)
        meeting.hear_all("ready", "to look at the checkpoint")
        meeting.tell("all ready", True)
    meeting.hear("all ready", "all ranks to look at the checkpoint")
    meeting.is_over = True
    return saved, config, prepared
