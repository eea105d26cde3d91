"""Pipeline schedules as the configuration names them: what `pipeline.schedule` stands for.

One of your own derives from `PipelineSchedule` and lists the actions of every rank, or from
`OneFOneB` and changes its warm-up:

    class EagerForward(OneFOneB):
        \"\"\"1F1B with twice the warm-up: a rank waits less for a late one, and stores more.\"\"\"

        def warm_up(self, rank: int, num_ranks: int, num_virtual_stages: int) -> int:
            return 2 * super().warm_up(rank, num_ranks, num_virtual_stages)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from attnres_train.config.kinds import CHOICES, Kind, NoOptions, resolve
from attnres_train.errors import UserError
from attnres_train.pipeline.plan.schedule import (
    Action,
    Schedule,
    gpipe,
    megatron_warm_up,
    one_f_one_b,
)
from attnres_train.pipeline.plan.validate import ScheduleError


class PipelineSchedule(Kind, ABC):
    """For each rank, the order of its forward and backward passes.

    ``section`` is a `PipelineConfig`, whose ``schedule_options`` are the kind's options.
    """

    @property
    def options(self) -> Any:
        return self.section.schedule_options

    @abstractmethod
    def actions(self, num_ranks: int, num_virtual_stages: int, num_micro_batches: int) -> Schedule:
        """Per rank, its actions in order: F and B of each of its chunks (``V`` of them: ``rank``,
        ``rank + P``, ...; see `pipeline.plan.layout`) for each micro-batch, all counted from 0.

        Every rank asks for the whole. It is proved before the first step (see `validate`).
        """

    def schedule(self, num_ranks: int, num_virtual_stages: int, num_micro_batches: int) -> Schedule:
        """The actions, once it is sure what `validate` takes from the schedule itself: that there
        are backward passes, and how many micro-batches. Raises ScheduleError."""
        listed = self.actions(num_ranks, num_virtual_stages, num_micro_batches)
        schedule = tuple(tuple(actions) for actions in listed)
        chunks, last = num_ranks * num_virtual_stages, num_micro_batches - 1
        for rank, actions in enumerate(schedule):
            for action in actions:
                if not (
                    isinstance(action, Action)
                    and action.kind in ("F", "B")
                    and 0 <= action.chunk < chunks
                    and 0 <= action.micro_batch <= last
                ):
                    raise ScheduleError(
                        f"rank {rank}: {action} is no Action of F or B, chunk 0 to {chunks - 1} "
                        f"and micro-batch 0 to {last}"
                    )
        for action in (Action("F", 0, last), Action("B", 0, last)):
            if not any(action in actions for actions in schedule):
                raise ScheduleError(f"{action} is never run")
        return schedule

    @contextmanager
    def faults_named(self) -> Iterator[None]:
        """Tell a ScheduleError from within as one of this schedule, by a UserError."""
        try:
            yield
        except ScheduleError as error:
            name = f"{self.key}.schedule {self.section.schedule}"
            raise UserError(f"{name} cannot be run: {error}") from error


class OneFOneB(PipelineSchedule):
    """One forward pass, one backward pass in turn after a warm-up; interleaved for more than one
    virtual stage (arXiv 2104.04473, section 2.2)."""

    def warm_up(self, rank: int, num_ranks: int, num_virtual_stages: int) -> int:
        """Forward passes that ``rank`` runs before its first pair of one forward, one backward:
        Megatron-LM's. More take more memory; with fewer, ranks wait for each other, for ever when
        interleaved, which is found before the first step."""
        return megatron_warm_up(rank, num_ranks, num_virtual_stages)

    def actions(self, num_ranks: int, num_virtual_stages: int, num_micro_batches: int) -> Schedule:
        return one_f_one_b(num_ranks, num_virtual_stages, num_micro_batches, self.warm_up)


class GPipe(PipelineSchedule):
    """All forward passes, then all backward passes (arXiv 1811.06965): every micro-batch's
    activations are alive at once."""

    def actions(self, num_ranks: int, num_virtual_stages: int, num_micro_batches: int) -> Schedule:
        return gpipe(num_ranks, num_virtual_stages, num_micro_batches)


def to_compare(section: Any) -> dict[str, PipelineSchedule]:
    """Our schedules, and the one that ``section``, a `PipelineConfig`, names: by name.

    Raises ConfigError as `resolve`.
    """
    choice = "pipeline.schedule"
    sections = {
        name: section.model_copy(update={"schedule": name, "schedule_options": NoOptions()})
        for name in CHOICES[choice].built_in
    }
    sections[section.schedule] = section
    return {name: resolve(choice, name)(named, "pipeline") for name, named in sections.items()}
