"""A few steps of chosen ranks under torch's profiler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from attnres_train.observe.observer import Observer, Record
from attnres_train.screen import say

FOLDER = "profile"
MEMORY_EVENTS = 100_000
"""The latest allocations that a snapshot holds."""


class Profiler(Observer):
    """Of the steps `observe.profile.steps` on this rank: a Chrome trace
    (``profile/rank_0_steps_20_22.json.gz`` in the run folder, for chrome://tracing or Perfetto)
    and, on CUDA, a snapshot of the allocator's memory (``.pickle``, for pytorch.org/memory_viz)."""

    def on_start(self, step: int) -> None:
        self.profiler: Any = None

    def on_step_begin(self, step: int) -> None:
        first, last = self.section.steps
        if self.profiler is not None or not first <= step <= last:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.run.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
        self.begun = self.step = step
        self.profiler = torch.profiler.profile(activities=activities, record_shapes=True)
        self.profiler.start()

    def on_step_end(self, record: Record) -> None:
        self.step = int(record["step"])
        if self.profiler is not None and self.step >= self.section.steps[1]:
            self._finish()

    def on_end(self) -> None:
        if self.profiler is not None:  # the run ends in the middle of them
            self._finish()

    def _finish(self) -> None:
        profiler, self.profiler = self.profiler, None
        profiler.stop()
        folder = self.run.folder / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        name = folder / f"rank_{self.run.rank}_steps_{self.begun}_{self.step}"
        profiler.export_chrome_trace(f"{name}.json.gz")
        if self.run.device.type == "cuda":
            torch.cuda.memory._dump_snapshot(f"{name}.pickle")
            torch.cuda.memory._record_memory_history(enabled=None)
        say(f"profile: {Path(f'{name}.json.gz')}")
