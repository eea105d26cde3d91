"""Which observers a run has."""

from __future__ import annotations

from collections.abc import Iterator

from attnres_train.config.kinds import resolve
from attnres_train.config.schema import RunConfig
from attnres_train.observe.console import Console
from attnres_train.observe.course import Course
from attnres_train.observe.curves import TensorBoard, Wandb
from attnres_train.observe.dispatch import Observers, named
from attnres_train.observe.facts import RunFacts
from attnres_train.observe.observed import Kept
from attnres_train.observe.observer import Observer, RunContext
from attnres_train.observe.plot import LossPlot
from attnres_train.observe.profile import Profiler
from attnres_train.observe.sample_lines import SampleLines
from attnres_train.observe.sinks import JsonLines


def build_observers(run: RunContext) -> Observers:
    """Those of this process: the user's first, then, on the main rank, ours, which log what the
    user's have added."""
    built_in = _built_in(run) if run.is_main else ()
    return Observers([*_own(run), *_profiling(run), *built_in])


def looks_at_gradients(config: RunConfig) -> bool:
    """Whether an observer of the user's does, on whichever rank: all replicas need them then."""
    kinds = [resolve("log.observers.kind", section.kind) for section in config.log.observers]
    return any(kind.on_backward is not Observer.on_backward for kind in kinds)


def _own(run: RunContext) -> Iterator[Observer]:
    for i, section in enumerate(run.config.log.observers):
        key, kind = f"log.observers.{i}", resolve("log.observers.kind", section.kind)
        if run.is_main or kind.everywhere:
            with named(key, kind, "__init__"):
                yield kind(section, key, run)


def _profiling(run: RunContext) -> Iterator[Observer]:
    section = run.config.observe.profile
    if section.steps and run.rank in section.ranks:
        yield Profiler(section, "observe.profile", run)


def _built_in(run: RunContext) -> Iterator[Observer]:
    log = run.config.log
    yield RunFacts(log, "log", run)
    yield Course(log, "log", run)  # before those that show what it adds
    yield JsonLines(log, "log", run)
    yield Kept(run.config.observe, "observe", run)
    yield Console(log, "log", run)
    if log.samples.interval:
        yield SampleLines(log, "log.samples", run)
    if log.tensorboard:
        yield TensorBoard(log, "log.tensorboard", run)
    if log.wandb.enabled:
        yield Wandb(log.wandb, "log.wandb", run)
    if log.plot:  # after the sink whose file it draws is closed
        yield LossPlot(log, "log.plot", run)
