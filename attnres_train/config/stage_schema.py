"""What a stage of a run may have of its own (`stages`): a closed list. Of every section that is in
it the one of the whole run derives, so that a key is declared once."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from attnres_train.config.data_schema import StagedData
from attnres_train.config.kind_fields import KindName, KindOptions, OptionsOf
from attnres_train.config.kinds import NoOptions
from attnres_train.config.model_schema import StagedMoE
from attnres_train.config.section import Section


class StagedTrain(Section):
    """What a stage of a run may have of its own."""

    train_iters: int = Field(ge=1)
    """Optimizer steps: of the whole run, or of a stage."""
    seq_length: int = Field(ge=1)
    """Tokens per sample."""
    micro_batch_size: int = Field(1, ge=1)
    """Samples per micro-batch and data-parallel rank."""
    global_batch_size: int = Field(ge=1)
    """Samples per optimizer step, over all data-parallel ranks."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation in the backward pass: `selective` reruns what each sublayer reads,
    the depth read and the norm after it; `full` reruns each decoder layer."""
    eval_interval: int = Field(0, ge=0)
    """Steps between validations; 0: none, and nothing is held out (`data.split`)."""
    eval_iters: int = Field(10, ge=1)
    """Global batches per validation."""


class StagedOptimizer(Section):
    """What a stage of a run may have of its own."""

    lr: float = Field(1e-3, gt=0)
    """Peak learning rate, shared by Muon and AdamW."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled weight decay."""


class LRScheduleConfig(Section):
    kind: Annotated[str, KindName("lr_schedule.kind")] = "cosine"
    """Shape after the warm-up: cosine to `min_lr_ratio`, warm-up-stable-decay, or constant."""
    warmup_iters: int = Field(0, ge=0)
    """Steps of linear warm-up, with which the run or the stage begins."""
    decay_end_iter: int | None = Field(None, ge=1)
    """Step at which `cosine` reaches the minimum (default: `train.train_iters`)."""
    wsd_decay_iters: int | None = Field(None, ge=1)
    """Steps of the linear decay with which `wsd` ends the run or the stage (default: a
    fifth of it)."""
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """Final learning rate over the peak."""
    options: Annotated[KindOptions, OptionsOf("lr_schedule.kind")] = Field(
        default_factory=NoOptions, validate_default=True
    )
    """Options that a kind of your own declares."""


class StagedModel(Section):
    """What a stage of a run may have of its own."""

    moe: StagedMoE = Field(default_factory=StagedMoE)
    """Mixture of experts."""


class StageConfig(Section):
    """A part of a run. What it does not set is as outside of `stages` (`config.stage_values`)."""

    name: str = Field(min_length=1)
    """Name of the stage, by which it is told."""
    train: StagedTrain
    """Its steps, length and batch."""
    optimizer: StagedOptimizer = Field(default_factory=StagedOptimizer)
    """Its peak learning rate and weight decay; the optimizer's state is carried over."""
    lr_schedule: LRScheduleConfig = Field(default_factory=LRScheduleConfig)
    """Its schedule, by steps of the stage. One of its own is whole: what it leaves out has its
    default. A later stage without one has that of the run, without the warm-up."""
    data: StagedData = Field(default_factory=StagedData)
    """Its corpora, of which it begins with sample 0; the tokenizer is the run's."""
    model: StagedModel = Field(default_factory=StagedModel)
    """What of the model is not of its shape."""
