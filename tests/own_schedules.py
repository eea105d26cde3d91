"""Schedules of a user's own, outside the package: of the learning rate, and of the pipeline. Right
ones first, then some that must be refused."""

from __future__ import annotations

import math

from pydantic import Field

from attnres_train.config.section import Section
from attnres_train.optim.schedules import LRSchedule
from attnres_train.pipeline.plan.schedule import Action, Schedule, gpipe, one_f_one_b
from attnres_train.pipeline.plan.schedule_kinds import OneFOneB, PipelineSchedule


class InverseSquareRoot(LRSchedule):
    """The peak over the square root of the time since the warm-up."""

    class Options(Section):
        timescale: int = Field(1000, ge=1)
        """Steps after the warm-up at which the peak has fallen by the square root of 2."""

    def after_warmup(self, step: int, peak: float, train_iters: int) -> float:
        since = step - self.section.warmup_iters
        return peak / math.sqrt(1 + since / self.options.timescale)


class LongWarmUp(OneFOneB):
    """1F1B that runs further ahead before its first backward pass."""

    class Options(Section):
        extra: int = Field(1, ge=0)
        """Forward passes beyond the usual warm-up."""

    def warm_up(self, rank: int, num_ranks: int, num_virtual_stages: int) -> int:
        return super().warm_up(rank, num_ranks, num_virtual_stages) + self.options.extra


class OneAtATime(PipelineSchedule):
    """Every micro-batch goes all the way before the next one starts."""

    def actions(self, num_ranks: int, num_virtual_stages: int, num_micro_batches: int) -> Schedule:
        return tuple(
            tuple(
                Action(kind, chunk, micro_batch)
                for micro_batch in range(num_micro_batches)
                for kind, step in (("F", 1), ("B", -1))
                for chunk in range(rank, num_ranks * num_virtual_stages, num_ranks)[::step]
            )
            for rank in range(num_ranks)
        )


class Diverging(LRSchedule):
    def after_warmup(self, step: int, peak: float, train_iters: int) -> float:
        return math.inf if step == train_iters else peak


class Incomplete(LRSchedule):
    pass


class NoSchedule:
    pass


class WithoutTheLast(PipelineSchedule):
    def actions(self, num_ranks: int, num_virtual_stages: int, num_micro_batches: int) -> Schedule:
        return gpipe(num_ranks, num_virtual_stages, num_micro_batches - 1)


class WithoutBackward(PipelineSchedule):
    def actions(self, *shape: int) -> Schedule:
        schedule = one_f_one_b(*shape)
        return tuple(tuple(a for a in actions if a.kind == "F") for actions in schedule)


class OfTuples(PipelineSchedule):
    def actions(self, *shape: int) -> Schedule:
        return [[tuple(action) for action in actions] for actions in one_f_one_b(*shape)]


class BeyondTheModel(PipelineSchedule):
    def actions(self, num_ranks: int, num_virtual_stages: int, num_micro_batches: int) -> Schedule:
        return gpipe(num_ranks, num_virtual_stages + 1, num_micro_batches)


class Deadlock(PipelineSchedule):
    def actions(self, *shape: int) -> Schedule:
        return tuple(actions[::-1] for actions in gpipe(*shape))
