"""Observers as a user would write them, for tests that need one."""

from __future__ import annotations

import math

from attnres_train.config.section import Section
from attnres_train.observe.observer import Observer, Record


class Quiet(Observer):
    """Looks on."""


class Poison(Observer):
    """Gives one parameter a gradient that is not finite."""

    everywhere = True

    class Options(Section):
        steps: list[int]
        infinite: bool = False
        name: str = "layers.1.mlp_res_norm"

    def on_backward(self, step, chunks):
        for chunk in chunks.values():
            for name, parameter in chunk.named_parameters():
                if step in self.options.steps and name.startswith(self.options.name):
                    parameter.grad.view(-1)[0] = math.inf if self.options.infinite else math.nan


class Crash(Observer):
    """Ends the run after its second step, before anything of that is saved."""

    everywhere = True

    def on_start(self, step: int) -> None:
        self.steps = 0

    def on_step_end(self, record: Record) -> None:
        self.steps += 1
        if self.steps == 2:
            raise RuntimeError("crashed as it was told to")
