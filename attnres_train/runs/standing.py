"""Where a run stands on disk, before any process of it starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnres_train.checkpoint import folders
from attnres_train.checkpoint.manifest import read_manifest
from attnres_train.config.schema import RunConfig
from attnres_train.config.stages import named
from attnres_train.runs import identity, stages
from attnres_train.runs.progress import Progress, Spikes


@dataclass(frozen=True)
class Standing:
    """The checkpoint that a run is to go on from, and what it holds beside tensors."""

    path: Path
    extras: Mapping[str, Any]
    """As of the stage that the run goes on with (`stages.seen_from`). Of a new run, ``progress`` is
    where that begins."""
    config: RunConfig
    """The run's, as it is in that stage."""
    is_new: bool = False
    """Whether it is another run that begins with the weights of this one (`checkpoint.load`)."""

    @property
    def stage(self) -> int:
        """Number of the stage that the run goes on with."""
        number: int = self.extras["progress"]["stage"]
        return number


def standing(config: RunConfig, damaged: Mapping[Path, str] | None = None) -> Standing | None:
    """Where ``config``'s run stands on disk; None: at the beginning. ``damaged`` checkpoints, path
    to problem, are passed over.

    Raises UserError where what `checkpoint.resume` or `checkpoint.load` asks for is not to be had,
    and where stages of the run that are over are others now.
    """
    folder = Path(config.run.dir) / config.run.name
    path = folders.resolve_resume(config.checkpoint.resume, folder / "checkpoints", damaged or {})
    if path is not None:
        now, extras = stages.seen_from(config, path, read_manifest(path).extras)
        return Standing(path, extras, now)
    if config.checkpoint.load is None:
        return None
    path = folders.resolve_path("checkpoint.load", config.checkpoint.load, folder / "checkpoints")
    extras, reset = dict(read_manifest(path).extras), config.checkpoint.reset
    start = Progress.of(extras["progress"])
    start.spikes = Spikes()  # of the other run
    if "schedule" in reset:
        start.step = start.tokens = start.stage = start.began = 0
    if "data" in reset:
        start.samples = 0
    now, extras = stages.seen_from(config, path, extras, start)
    return Standing(path, extras, now, is_new=True)


def nothing_left(config: RunConfig) -> str | None:
    """Why there is nothing to train, and what to change; None if there is. Nothing is written.

    Raises UserError as `standing` does, and where the checkpoint is of another model.
    """
    found = standing(config)
    if found is None:
        return None
    with stages.problems_named(config, found.stage):
        identity.compare(found.config, found.path, found.extras, None, goes_on=not found.is_new)
        told = identity.nothing_left(found.config, found.path, found.extras)
    return told and named(config, found.stage, told)
