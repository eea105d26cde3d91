"""What a record says of the run so far, beside its step: smoothed loss, time, FLOPs."""

from __future__ import annotations

import math
import time

from attnres_train.observe.observer import Observer, Record
from attnres_train.observe.sinks import METRICS, read_records

HALF_LIFE_STEPS = 20
"""After so many steps a loss has half the weight of the latest one in the smoothed loss."""


class Smoothed:
    """An exponential moving average, bias-corrected as Adam's (arXiv 1412.6980, section 3): the
    first value counts in full. What is not finite is passed over."""

    def __init__(self, half_life: float = HALF_LIFE_STEPS) -> None:
        self._decay = 0.5 ** (1 / half_life)
        self._sum = self._weight = 0.0

    def add(self, value: float) -> float:
        """The average after ``value``; NaN as long as there is nothing to average."""
        if math.isfinite(value):
            self._sum = self._decay * self._sum + (1 - self._decay) * value
            self._weight = self._decay * self._weight + (1 - self._decay)
        return self._sum / self._weight if self._weight else math.nan


class Course(Observer):
    """Adds to each record ``smoothed_loss`` (nats per token), ``time`` (seconds since the epoch),
    ``wall_seconds`` since the run's first step, without the time between attempts, and ``flops``,
    useful ones of all steps so far. All follow from the records up to a step, so that a run which
    resumes, or goes back, goes on as one that did not."""

    def on_start(self, step: int) -> None:
        self.smoothed, self.before, self.flops = Smoothed(), 0.0, 0.0
        for record in read_records(self.run.folder / METRICS):
            if record["step"] <= step:
                self.smoothed.add(record["loss"])
                self.before = record.get("wall_seconds", self.before + record["step_seconds"])
                self.flops = record.get("flops", self.flops + self._flops(record))
        self.begun: float | None = None

    def on_roll_back(self, step: int) -> None:
        """Time that was spent on steps that are undone was spent."""
        spent = self._wall_seconds()
        self.on_start(step)
        self.before, self.begun = spent, time.monotonic()

    def on_step_begin(self, step: int) -> None:
        if self.begun is None:
            self.begun = time.monotonic()

    def on_step_end(self, record: Record) -> None:
        self.flops += self._flops(record)
        ours = {
            "smoothed_loss": self.smoothed.add(record["loss"]),
            "time": time.time(),
            "wall_seconds": self._wall_seconds(),
            "flops": self.flops,
        }
        # An observer of the user's may have used one of the names first.
        record |= {name: value for name, value in ours.items() if name not in record}

    def _wall_seconds(self) -> float:
        return self.before + (time.monotonic() - self.begun if self.begun is not None else 0.0)

    def _flops(self, record: Record) -> float:
        """Of one step; runs of before have no such record."""
        return record.get("tflops", 0.0) * 1e12 * record["step_seconds"] * self.run.world_size
