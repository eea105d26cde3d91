"""How far a run is, and what it knows of its loss spikes; a checkpoint holds both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


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
    """Of the last spikes, the step before which the newest checkpoint is kept."""
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
    """Number of the stage under way, 0 where there are none (`attnres_train.runs.stages`)."""
    began: int = 0
    """The step after which it began: its ``samples`` count from there."""

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Progress:
        """From what `plain` has made, of whatever age."""
        return cls(**{**plain, "spikes": Spikes(**plain.get("spikes", {}))})

    def plain(self) -> dict[str, Any]:
        """As values for JSON."""
        return asdict(self)
