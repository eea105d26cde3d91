"""One worker of a run: meets the others, builds this rank's parts and starts the loop."""

from __future__ import annotations

import gc
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

from attnres_train.config import describe
from attnres_train.config.schema import RunConfig
from attnres_train.config.stages import called, stage_configs
from attnres_train.parallel.meeting import Meeting, meet
from attnres_train.parallel.ranks import Ranks, join_run
from attnres_train.parallel.table import rank_table
from attnres_train.planning.build import chunk_layers
from attnres_train.planning.facts import facts
from attnres_train.runs.progress import Progress
from attnres_train.runs.start import Start, check_together, prepare_together
from attnres_train.screen import say
from attnres_train.supervise.board import Board, own_connection
from attnres_train.supervise.rank_logs import logged
from attnres_train.supervise.recorder import Recorder
from attnres_train.supervise.run_lock import owned
from attnres_train.supervise.signals import StopSignals, heard
from attnres_train.supervise.watch import Pulse, Watch
from attnres_train.training.building import build_parts
from attnres_train.training.parts import Parts
from attnres_train.training.trainer import Trainer


def train(config: RunConfig) -> int:
    """Train ``config`` as one of the run's processes (torchrun's environment). Returns 0, also when
    a signal stopped the run (it is saved, and the same command resumes it), and when there is
    nothing to train, which leaves the run folder as it is."""
    folder = Path(config.run.dir) / config.run.name
    with heard(with_agent=True) as stop, meet(config.run.start_timeout_seconds) as meeting:
        start = prepare_together(config, meeting)
        if isinstance(start, str):
            if meeting.rank == 0:
                say(start)
            return 0
        with owned(folder):
            check_together(folder, start, meeting)
            _train(config, meeting, start, folder, stop)
    return 0


def _train(
    config: RunConfig, meeting: Meeting, start: Start, folder: Path, stop: StopSignals
) -> None:
    with (
        logged(folder, meeting.rank),
        join_run(config, meeting) as ranks,
        watched(folder, ranks) as (pulse, recorder),
    ):
        stop.will_save()
        if ranks.is_main and (table := rank_table(config.parallel, ranks.world_size)):
            say(table)
        stages = list(enumerate(stage_configs(config)))[start.stage :]
        for place, (number, stage) in enumerate(stages):
            if ranks.is_main and config.stages:
                say(called(config, number))
            files = start.files[place] if start.files else None
            make = partial(build_parts, stage, ranks, start.prepared[place], pulse, files)
            progress, goes_on = _train_stage(stage, ranks, make, stop, recorder)
            if not goes_on:
                break
            gc.collect()  # what the stage had makes room for the next one's
        if ranks.is_main and progress.step < config.total_iters:
            say(f"stopped after step {progress.step}, saved; the same command resumes")
        elif ranks.is_main:
            say(what_next(folder, progress.step))


def what_next(folder: Path, step: int) -> str:
    """What is told at the end of a run that is done."""
    run = shlex.quote(str(folder))
    return (
        f"done after step {step}, in {folder}; what next:\n"
        f"  attnres-train report {run}\n"
        f"  attnres-train inspect {run}\n"
        f"  attnres-train generate {run} --prompt TEXT"
    )


def _train_stage(
    config: RunConfig,
    ranks: Ranks,
    make_parts: Callable[[], Parts],
    stop: StopSignals,
    recorder: Recorder,
) -> tuple[Progress, bool]:
    """Train the stage that ``config`` is, from where the run stands; a run without stages is one.
    Returns how far the run is, and whether it goes on with the next stage."""
    parts = make_parts()
    if ranks.is_main:
        more = facts(config, ranks.device, ranks.world_size)
        say(describe(config, chunk_layers(config), ranks.world_size, more))
    trainer = Trainer(config, ranks, parts, stop, recorder)
    progress, stop_after = trainer.fit(), config.train.stop_after
    whole = progress.step == progress.began + config.train.train_iters
    return progress, whole and not trainer.stopped and progress.step != stop_after


@contextmanager
def watched(folder: Path, ranks: Ranks) -> Iterator[tuple[Pulse, Recorder]]:
    """Others' failures end this process, and its own are written down, while the context lasts."""
    pulse, limit = Pulse(), ranks.timeout.total_seconds()
    watch = Watch(Board(folder, ranks.rank, own_connection()), pulse, limit)
    board = Board(folder, ranks.rank, own_connection())
    recorder = Recorder(board, ranks.own_pipeline, ranks.world_size, watch.stop)
    with recorder.recorded(), watch.over() if ranks.world_size > 1 else nullcontext():
        yield pulse, recorder
