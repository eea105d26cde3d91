"""Observers as a user would write them, for tests that need one."""

from __future__ import annotations

import math
import os
import signal
import time
from contextlib import suppress

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


class Told(Observer):
    """Is told to stop at the end of a validation, right before the step is saved."""

    def on_validation(self, step: int, loss: float) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)


class Crash(Observer):
    """Ends the run after its second step, before anything of that is saved."""

    everywhere = True

    def on_start(self, step: int) -> None:
        self.steps = 0

    def on_step_end(self, record: Record) -> None:
        self.steps += 1
        if self.steps == 2:
            raise RuntimeError("crashed as it was told to")


class Hurt(Observer):
    """Spoils the weights in some steps, so that the loss of the next one spikes."""

    everywhere = True

    class Options(Section):
        times: list[int]
        """Of the steps of this run as they are made, also those that come again: which ones."""
        crash: bool = False
        """End the run right after it has gone back."""
        damage: int = 0
        """Flip a byte in the checkpoint of that step once it is saved."""

    def on_start(self, step: int) -> None:
        self.made = step

    def on_backward(self, step, chunks):
        self.made += 1
        if self.made in self.options.times:
            for chunk in chunks.values():
                for name, parameter in chunk.named_parameters():
                    if name.startswith(("norm.", "layers.3.mlp")):
                        parameter.data.mul_(-30)

    def on_roll_back(self, step: int) -> None:
        if self.options.crash:
            raise RuntimeError("crashed as it was told to")

    def on_save(self, step, path):
        if step == self.options.damage and self.run.is_main:
            data = path / "rank_00000.safetensors"
            content = bytearray(data.read_bytes())
            content[-5] ^= 16
            data.write_bytes(content)


class Sleeper(Observer):
    """Hangs, on one rank."""

    everywhere = True

    class Options(Section):
        rank: int
        step: int

    def on_step_begin(self, step):
        if (self.run.rank, step) == (self.options.rank, self.options.step):
            time.sleep(600)


class Hog(Observer):
    """Leaves no room on the disk of the run folder, and gives every step a long record."""

    class Options(Section):
        first: int
        """The step at which the disk is full."""
        last: int = 0
        """The step at which it has room again; 0: at none."""

    def on_step_begin(self, step):
        hog = self.run.folder / "hog"
        if step == self.options.first:
            with suppress(OSError), open(hog, "wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
        if step == self.options.last:
            hog.unlink()

    def on_step_end(self, record):
        record.update({f"more/{number}": number for number in range(500)})
