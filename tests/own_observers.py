"""Observers as a user would write them, for tests that need one."""

from __future__ import annotations

from attnres_train.observe.observer import Observer, Record


class Quiet(Observer):
    """Looks on."""


class Crash(Observer):
    """Ends the run after its second step, before anything of that is saved."""

    everywhere = True

    def on_start(self, step: int) -> None:
        self.steps = 0

    def on_step_end(self, record: Record) -> None:
        self.steps += 1
        if self.steps == 2:
            raise RuntimeError("crashed as it was told to")
