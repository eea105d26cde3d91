"""Learning-rate schedules: what `lr_schedule.kind` names.

One of your own derives from `LRSchedule` and says the learning rate after the warm-up:

    class InverseSquareRoot(LRSchedule):
        \"\"\"The peak over the square root of the steps since the warm-up (arXiv 1706.03762).\"\"\"

        def after_warmup(self, step: int, peak: float, train_iters: int) -> float:
            return peak / math.sqrt(step - self.section.warmup_iters)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

from attnres_train.config.files import unread
from attnres_train.config.kinds import Kind
from attnres_train.config.schema import LRScheduleConfig, RunConfig
from attnres_train.errors import UserError

KEYS_OF_SOME_KINDS = ("decay_end_iter", "wsd_decay_iters")
"""Keys of the section that not every kind reads: a value is an error with the others."""


class LRSchedule(Kind, ABC):
    """Linear warm-up, then what the kind says: a pure function of the step, with nothing to save.

    The warm-up, ``peak * step / warmup_iters``, reaches the peak at step ``warmup_iters``.
    """

    section: LRScheduleConfig
    reads: ClassVar[tuple[str, ...]] = ()
    """Those of `KEYS_OF_SOME_KINDS` that this kind reads."""

    @abstractmethod
    def after_warmup(self, step: int, peak: float, train_iters: int) -> float:
        """Learning rate of update ``step``, which is above ``warmup_iters``, in a run of
        ``train_iters`` updates. Steps beyond the run are asked for too."""

    def learning_rate(self, step: int, peak: float, train_iters: int) -> float:
        """Learning rate of update ``step`` (1 = the run's first).

        Raises UserError if the kind gives one that is not finite, or below 0.
        """
        if step < 1:
            raise ValueError(f"updates are counted from 1, not {step}")
        if step <= self.section.warmup_iters:
            return peak * step / self.section.warmup_iters
        rate = self.after_warmup(step, peak, train_iters)
        if not (math.isfinite(rate) and rate >= 0):
            raise UserError(
                f"{self.key}.kind {self.section.kind} gives a learning rate of {rate} at step "
                f"{step}: it must be finite and at least 0"
            )
        return rate

    def check(self, config: RunConfig) -> Iterator[str]:
        """Keys that the kind does not read; its learning rates after the warm-up and at the end."""
        for name in KEYS_OF_SOME_KINDS:
            if name not in self.reads and getattr(self.section, name) is not None:
                yield unread(f"{self.key}.{name}", self.section.kind)
        end = config.train.train_iters
        try:
            for step in {min(self.section.warmup_iters + 1, end), end}:
                self.learning_rate(step, config.optimizer.lr, end)
        except UserError as error:
            yield str(error)

    def summary(self, config: RunConfig) -> str:
        """The learning rates of a run, for its summary."""
        peak, end, warmup = config.optimizer.lr, config.train.train_iters, self.section.warmup_iters
        if warmup >= end:
            reached = self.learning_rate(end, peak, end)
            return f"{reached:g} at the last step, still warming up to {peak:g}"
        then = self.then(peak, end)
        return f"{peak:g} from step {max(1, warmup)}" + (f", {then}" if then else "")

    def then(self, peak: float, train_iters: int) -> str:
        """What comes after the warm-up, in a few words; nothing where the peak stays."""
        rate = self.learning_rate(train_iters, peak, train_iters)
        return f"{self.section.kind} to {rate:g} at step {train_iters:,}"


class Cosine(LRSchedule):
    """Half a cosine from the end of the warm-up to the peak times `min_lr_ratio` at step
    `decay_end_iter` (default: the last), and that from there on.

    Moonlight's pre-training: 2k warm-up steps, 4.2e-4 to 4.2e-5 (arXiv 2502.16982).
    """

    reads = ("decay_end_iter",)

    def after_warmup(self, step: int, peak: float, train_iters: int) -> float:
        low, end = peak * self.section.min_lr_ratio, self.section.decay_end_iter or train_iters
        done = _progress(step, self.section.warmup_iters, end)
        return low + (peak - low) * (1 + math.cos(math.pi * done)) / 2

    def check(self, config: RunConfig) -> Iterator[str]:
        yield from super().check(config)
        end, warmup = self.section.decay_end_iter, self.section.warmup_iters
        if end is not None and end <= warmup:
            yield (
                f"{self.key}.decay_end_iter is {end}, but the warm-up lasts until "
                f"{self.key}.warmup_iters {warmup}: the cosine ends at decay_end_iter, counted "
                "from the start of the run"
            )

    def then(self, peak: float, train_iters: int) -> str:
        end = self.section.decay_end_iter or train_iters
        return f"cosine to {peak * self.section.min_lr_ratio:g} at step {end:,}"


class WarmupStableDecay(LRSchedule):
    """The peak, then a straight line to the peak times `min_lr_ratio` over the last
    `wsd_decay_iters` steps (default: a fifth of the run).

    With ``min_lr_ratio: 0`` the end of Moonlight's cool-down (arXiv 2502.16982). Kimi K2 (arXiv
    2507.20534) has a cosine for the line: 500 warm-up steps, 2e-4 to 2e-5.
    """

    reads = ("wsd_decay_iters",)

    def after_warmup(self, step: int, peak: float, train_iters: int) -> float:
        low = peak * self.section.min_lr_ratio
        return peak + (low - peak) * _progress(step, self._start(train_iters), train_iters)

    def then(self, peak: float, train_iters: int) -> str:
        low, asked = peak * self.section.min_lr_ratio, self.section.wsd_decay_iters or 0
        there = train_iters - self.section.warmup_iters
        short = (
            f" (not over wsd_decay_iters {asked:,}: the run is shorter)" if asked > there else ""
        )
        line = f"linear from step {self._start(train_iters):,} to {low:g} at step {train_iters:,}"
        return line + short

    def _start(self, train_iters: int) -> int:
        """The last step at the peak."""
        length = self.section.wsd_decay_iters or max(1, train_iters // 5)
        return max(self.section.warmup_iters, train_iters - length)


class Constant(LRSchedule):
    """The peak, from the end of the warm-up to that of the run."""

    def after_warmup(self, step: int, peak: float, train_iters: int) -> float:
        return peak

    def then(self, peak: float, train_iters: int) -> str:
        return ""


def _progress(step: int, start: int, end: int) -> float:
    """Share of the way from ``start`` to ``end``, within 0 and 1."""
    return min(1.0, max(0, step - start) / max(1, end - start))
