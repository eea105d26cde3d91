"""Loss spikes: told and counted by all ranks alike, since the loss is the same on each of them, and
with `train.on_spike: roll_back` what sends the run back to a checkpoint from before."""

from __future__ import annotations

import math
from statistics import median

from attnres_train.config.schema import TrainSection
from attnres_train.runs.progress import Progress
from attnres_train.screen import complain

NORMAL = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""
FLOOR = 1e-3
"""The least standard deviation, over the median: rounding is no spike where losses do not vary."""
KEPT_BEFORE = 2
"""Of how many spikes, the last ones, the checkpoint from before is kept."""


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
