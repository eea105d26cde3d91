"""Loss spikes: told and counted by all ranks alike, since the loss is the same on each of them, and
with `train.on_spike: roll_back` what sends the run back to a checkpoint from before."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from attnres_train.config.schema import TrainSection
from attnres_train.screen import complain

NORMAL = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""
FLOOR = 1e-3
"""The least standard deviation, over the median: rounding is no spike where losses do not vary."""
KEPT_BEFORE = 2
"""Of how many spikes the checkpoint from before is kept."""


@dataclass
class Spikes:
    """What a run knows of its spikes. It is part of a checkpoint: a run that resumes decides as one
    that never stopped."""

    recent: list[float] = field(default_factory=list)
    """The last losses that were finite, from old to new, at most `train.spike_window`."""
    since: int = 0
    """The step with which the present spike began, 0: there is none."""
    count: int = 0
    """Of all so far, also those that a roll-back has undone."""
    before: list[int] = field(default_factory=list)
    """Of the last `KEPT_BEFORE` spikes, the step before which the newest checkpoint is kept."""
    roll_backs: int = 0
    back_to: int | None = None
    """The step that the last one went to."""


@dataclass
class Progress:
    """How far a run is: what a checkpoint holds beside tensors."""

    step: int = 0
    samples: int = 0
    """Of the data, consumed. After a roll-back more than steps: what was passed over counts."""
    tokens: int = 0
    skipped: int = 0
    """Of the steps, those whose loss or gradient was not finite: nothing was learnt from them."""
    spikes: Spikes = field(default_factory=Spikes)
    stage: int = 0
    """Number of the stage under way, 0 where there are none (`attnres_train.stages`)."""
    began: int = 0
    """The step after which it began: its ``samples`` count from there."""

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Progress:
        """From what `plain` has made, of whatever age."""
        return cls(**{**plain, "spikes": Spikes(**plain.get("spikes", {}))})

    def plain(self) -> dict[str, Any]:
        """As values for JSON."""
        return asdict(self)


def limit_of(recent: list[float], deviations: float) -> float:
    """The loss beyond which a step spikes: so many robust standard deviations above the median."""
    middle = median(recent)
    spread = NORMAL * median(abs(loss - middle) for loss in recent)
    return middle + deviations * max(spread, FLOOR * abs(middle))


def look(section: TrainSection, progress: Progress, loss: float, is_main: bool) -> None:
    """Take into account the ``loss`` of the step just made. Where a spike begins with it,
    ``progress.spikes.since`` is that step, and it is told.

    Nothing is one before the window is full: first losses fall fast, and say little of the next.
    The losses of a spike are in the window too: one that lasts is the usual after half a window.
    """
    window, spikes = section.spike_window, progress.spikes
    if not window or not math.isfinite(loss):
        return
    del spikes.recent[:-window]
    limit = math.inf
    if len(spikes.recent) == window:
        limit = limit_of(spikes.recent, section.spike_deviations)
    if loss <= limit:
        if spikes.since and is_main:
            complain(
                f"the spike of step {spikes.since} stands out no more: the loss of step "
                f"{progress.step} is {loss:.4f}"
            )
        spikes.since = 0
    elif not spikes.since:
        spikes.since = progress.step
        spikes.count += 1
        spikes.before = [*spikes.before, progress.step][-KEPT_BEFORE:]
        if is_main:
            usual = median(spikes.recent)
            complain(
                f"the loss of step {progress.step} spikes: {loss:.4f}; the last {window} have a "
                f"median of {usual:.4f}, their limit is {limit:.4f} "
                f"(spike {spikes.count} of the run)"
            )
    spikes.recent = [*spikes.recent, loss][-window:]
