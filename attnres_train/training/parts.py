"""What the loop drives: the parts of a run, built for this rank by `building.build_parts`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from attnres_train.data.loader import BatchSource
from attnres_train.model.chunk import ModelChunk
from attnres_train.observe.dispatch import Observers
from attnres_train.parallel.owned import OwnedOptimizer
from attnres_train.pipeline.run.engine import Engine
from attnres_train.supervise.watch import Pulse
from attnres_train.training.run_state import Checkpoints
from attnres_train.training.samples import Samples


@dataclass
class Parts:
    """All of them are this rank's."""

    chunks: Mapping[int, ModelChunk]
    """By index, in model order."""
    engine: Engine
    optimizer: OwnedOptimizer
    data: BatchSource
    checkpoints: Checkpoints
    observers: Observers
    flops_per_token: Callable[[float], float]
    """Of the `mean_document_length` of what is trained on."""
    peak_flops: float | None
    samples: Samples | None = None
    planned_bubble: float | None = None
    """Of the schedule, by `planning.bubble.planned_bubble`; None without a pipeline."""
    pulse: Pulse = field(default_factory=Pulse)
