"""What classes of your own derive from and are made of, under names that stay whatever room they
move to (docs/extending.md). Nothing of ours imports this: it loads all rooms, and torch.
"""

from __future__ import annotations

from attnres_train.config.section import Section
from attnres_train.data.corpora.reader import CorpusReader, Passage
from attnres_train.data.tokenizers.kind import Backend, TokenizerKind
from attnres_train.errors import UserError
from attnres_train.model.parameters import Learned, ParameterRule, constant, normal, uniform
from attnres_train.model.residual.kind import ResidualKind
from attnres_train.model.residual.stream import Residual, ResidualStream
from attnres_train.observe.observer import Observer, Record, RunContext
from attnres_train.optim.kinds import OptimizerKind, Part
from attnres_train.optim.schedules import LRSchedule
from attnres_train.pipeline.plan.schedule import Action, Schedule
from attnres_train.pipeline.plan.schedule_kinds import OneFOneB, PipelineSchedule

__all__ = [
    "Action",
    "Backend",
    "CorpusReader",
    "LRSchedule",
    "Learned",
    "Observer",
    "OneFOneB",
    "OptimizerKind",
    "ParameterRule",
    "Part",
    "Passage",
    "PipelineSchedule",
    "Record",
    "Residual",
    "ResidualKind",
    "ResidualStream",
    "RunContext",
    "Schedule",
    "Section",
    "TokenizerKind",
    "UserError",
    "constant",
    "normal",
    "uniform",
]
