"""The typed, closed schema of a run. Every field's docstring is its documentation and goes into the
JSON schema; relations between fields are checked in `config.checks`."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from attnres_train.config.data_schema import DataConfig
from attnres_train.config.kind_fields import KindName, KindOptions, OptionsOf
from attnres_train.config.kinds import NoOptions
from attnres_train.config.model_schema import ModelConfig
from attnres_train.config.observe_schema import ObserveConfig
from attnres_train.config.paths import holding_names, holding_paths
from attnres_train.config.section import Section
from attnres_train.config.stage_schema import (
    LRScheduleConfig,
    StageConfig,
    StagedOptimizer,
    StagedTrain,
)
from attnres_train.config.stage_values import completed

MOST_ROLL_BACKS = 100
"""More than any run has a use for: the data that one may take are counted by it."""


class RunSection(Section):
    name: str = Field("run", min_length=1)
    """Name of the run; its folder is `<dir>/<name>`."""
    dir: str = Field("runs", min_length=1)
    """Folder that holds the runs. Here as in every path, `~` and `$NAME` are expanded."""
    seed: int = Field(1234, ge=0)
    """Seed of initial weights and data order."""
    start_timeout_seconds: float = Field(3600, gt=0)
    """Time that processes wait for each other before step 1: for all to join, and for rank 0 to
    prepare the data."""

    _paths = holding_paths("dir")
    _names = holding_names("name")


class ParallelConfig(Section):
    pipeline_model_parallel_size: int = Field(1, ge=1)
    """Pipeline stages (ranks) P."""
    virtual_pipeline_model_parallel_size: int = Field(1, ge=1)
    """Virtual stages V: model chunks on each pipeline rank."""
    tensor_model_parallel_size: int = Field(1, ge=1)
    """Tensor-parallel size."""
    expert_model_parallel_size: int = Field(1, ge=1)
    """Expert-parallel size: ranks of a stage that share the routed experts of a layer, each with as
    many of them. They may be tensor-parallel, context-parallel and data-parallel ranks."""
    expert_dispatcher: Literal["exact", "bounded", "deepep"] = "exact"
    """How tokens reach the experts of other ranks. `exact`: as many as there are; to know them the
    host waits for the device. `bounded`: room for a fixed number, and no wait; a step for which it
    does not suffice is passed over (`train.max_skipped_steps`). `deepep`: by DeepEP's kernels,
    where they are installed."""
    expert_capacity_factor: float = Field(1.5, ge=1)
    """Room with `bounded`, over what comes to a rank where the load is even."""
    context_parallel_size: int = Field(1, ge=1)
    """Context-parallel size: ranks that share the tokens of every sample, each with two of as many
    equal shares of `train.seq_length` as twice their number, one from either end."""
    layout: Literal["even", "auto"] | list[int] | str = "even"
    """Decoder layers per chunk: `even`; `auto`, balanced by the FLOPs of each layer and of the head
    (`pipeline.plan.layout.balanced_bounds`); one count per chunk in model order (P*V of them); or
    Megatron's layout string, e.g. `Et*3|(tt|)*2ttL` (see `config.layout_text`)."""

    @property
    def num_chunks(self) -> int:
        return self.pipeline_model_parallel_size * self.virtual_pipeline_model_parallel_size

    @property
    def model_parallel_size(self) -> int:
        """Ranks that one replica of the model takes."""
        return (
            self.pipeline_model_parallel_size
            * self.tensor_model_parallel_size
            * self.context_parallel_size
        )

    @property
    def least_processes(self) -> int:
        """Processes that hold all of the model: experts may be shared by several replicas of the
        rest of it."""
        of_stage = self.tensor_model_parallel_size * self.context_parallel_size
        shared = math.lcm(of_stage, self.expert_model_parallel_size)
        return self.pipeline_model_parallel_size * shared


class PipelineConfig(Section):
    schedule: Annotated[str, KindName("pipeline.schedule")] = "1f1b"
    """Order of forward and backward passes. `1f1b`: interleaved where V > 1; `gpipe`: all forward
    passes, then all backward ones, with every micro-batch's activations alive at once."""
    schedule_options: Annotated[KindOptions, OptionsOf("pipeline.schedule", by="schedule")] = Field(
        default_factory=NoOptions, validate_default=True
    )
    """Options that a schedule of your own declares."""
    debug: bool = False
    """Send the identity of every block beside it and check it on arrival."""
    timeout_seconds: float = Field(600, gt=0)
    """Time after which a wait for a peer ends the run."""


class TrainSection(StagedTrain):
    stop_after: int | None = Field(None, ge=1)
    """Stop (saved, resumable) after this step although `train_iters` is larger."""
    precision: Literal["fp32", "bf16", "bf16_params"] = "fp32"
    """`bf16`: autocast over fp32 parameters; `bf16_params`: bf16 parameters, fp32 masters.
    Gradients are fp32 with all of them."""
    clip_grad: float = Field(1.0, ge=0)
    """Largest global gradient norm; 0 turns clipping off (the norm is still logged)."""
    max_skipped_steps: int = Field(3, ge=0)
    """Steps in a row that may be passed over because their loss or gradient is not finite; one more
    ends the run. 0: the first one does."""
    spike_window: int = Field(100, ge=0)
    """Last losses that one is compared with: a spike is told, and a checkpoint from before it kept;
    nothing before there are that many. 0: nothing is a spike."""
    spike_deviations: float = Field(10, gt=0)
    """Robust standard deviations (by the median absolute one) above the median: a spike."""
    on_spike: Literal["tell", "roll_back"] = "tell"
    """`roll_back`: go on from the newest checkpoint before the spike, with the data after it."""
    max_roll_backs: int = Field(5, ge=0, le=MOST_ROLL_BACKS)
    """Roll-backs of a run; the next spike ends it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; `auto` takes CUDA when it is there."""
    backend: Literal["auto", "torch", "te"] = "auto"
    """Who makes the linear maps of attention, dense and shared MLP: `te`, Transformer Engine, on
    CUDA alone; `auto`: Transformer Engine on CUDA, where it is installed and a small map of it
    gives what torch's does, and torch else, which adds up gradients of 16-bit parameters with
    apex's kernel where that is installed. (Not measured yet.)"""


class OptimizerConfig(StagedOptimizer):
    kind: Annotated[str, KindName("optimizer.kind")] = "muon"
    """`muon`: Muon for matrices and AdamW for the rest; `adamw`: AdamW for everything."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's betas."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    momentum: float = Field(0.95, ge=0, lt=1)
    """Muon's momentum (Nesterov)."""
    ns_steps: int = Field(5, ge=1)
    """Newton-Schulz steps."""
    ns_dtype: Literal["auto", "bf16", "fp32", "fp64"] = "auto"
    """Dtype of Newton-Schulz; `auto`: bf16 on CUDA, fp32 on CPU."""
    per_head: bool = False
    """Muon orthogonalises the maps to queries, keys and values head by head, not whole."""
    adamw_matrices: list[Literal["router", "low_rank"]] = Field(default_factory=list)
    """Matrices that `muon` leaves to AdamW: the `router`'s; the `low_rank` factors of KDA's gates,
    of MLA's keys and values and of the gates on norms."""
    qk_clip: float = Field(0, ge=0)
    """QK-clip (MuonClip; 100 in Kimi K2): after each step, heads of MLA of which an attention logit
    of the step was larger have their query and key maps scaled back to it; `max_attention_logit` is
    logged. Attention's logits are computed once more for it, twice more where its layer is rerun
    (`train.recompute: full`). 0: off, and nothing is looked at."""
    sharded: bool = True
    """Each data-parallel replica keeps the optimizer's state (and fp32 masters) of the matrices,
    and rows of tables, that it owns, updates those and sends them to the others (ZeRO-1); else each
    does all."""
    options: Annotated[KindOptions, OptionsOf("optimizer.kind")] = Field(
        default_factory=NoOptions, validate_default=True
    )
    """Options that a kind of your own declares."""

    @field_validator("adamw_matrices", mode="before")
    @classmethod
    def _one_alone(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class CheckpointConfig(Section):
    save_interval: int = Field(0, ge=0)
    """Steps between checkpoints; 0: only at the end of the run."""
    keep_last: int = Field(2, ge=1)
    """Newest checkpoints to keep."""
    keep_every: int = Field(0, ge=0)
    """Steps between checkpoints that are kept for good (a multiple of `save_interval`); 0: none."""
    async_save: bool = True
    """Train on while a checkpoint is written, from a copy in host memory."""
    timeout_seconds: float = Field(3600, gt=0)
    """Time that ranks wait for each other while a checkpoint is written or read."""
    drift_interval: int = Field(100, ge=0)
    """Steps between comparisons of data-parallel replicas, by checksums; 0: none."""
    on_damage: Literal["use_older", "error"] = "use_older"
    """Where the newest checkpoint turns out to be damaged: go on from the one before, or end."""
    resume: str = "auto"
    """Where the run begins. `auto`: at the run folder's newest checkpoint if there is one; `never`:
    at step 0, what is there is moved aside; or a path. Once the folder has a checkpoint of a run
    that began so, that one is resumed."""
    load: str | None = None
    """Path as for `resume`: a new run starts from the weights of that checkpoint."""
    reset: list[Literal["optimizer", "schedule", "data"]] = Field(["optimizer", "schedule", "data"])
    """What starts anew with `load`: the optimizer's state, the count of steps (learning rate), the
    place in the data."""
    allow: list[Literal["model", "data", "tokenizer"]] = Field(default_factory=list)
    """Go on although the checkpoint is of another model, other data or another tokenizer, which is
    an error else (see docs/checkpoints.md)."""

    @field_validator("allow", "reset", mode="before")
    @classmethod
    def _one_alone(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    _paths = holding_paths("resume", "load")


class WandbConfig(Section):
    enabled: bool = False
    """Log to Weights & Biases."""
    project: str = "attnres-train"
    """Project to log to."""
    mode: Literal["online", "offline"] = "online"
    """`offline` writes to the run folder for a later `wandb sync`."""


class ObserverConfig(Section):
    kind: Annotated[str, KindName("log.observers.kind")]
    """Class of your own, `module:Name`, derived from `attnres_train.observe.observer.Observer`."""
    options: Annotated[KindOptions, OptionsOf("log.observers.kind")] = Field(
        default_factory=NoOptions, validate_default=True
    )
    """Options that a kind of your own declares."""

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value


class SamplesConfig(Section):
    interval: int = Field(0, ge=0)
    """Steps between samples of text; 0: none."""
    prompts: list[str] = Field([""], min_length=1)
    """What each sample goes on with; an empty prompt begins a document."""
    max_new_tokens: int = Field(64, ge=1)
    """Tokens of a sample, unless its document ends before."""
    temperature: float = Field(0.8, ge=0, allow_inf_nan=False)
    """Of what is drawn, the same draws each time; 0: always the likeliest token."""


class LogConfig(Section):
    interval: int = Field(10, ge=1)
    """Steps between log lines."""
    progress: Literal["auto", "on", "off"] = "auto"
    """Progress bar; `auto`: on a terminal."""
    tensorboard: bool = False
    """Write TensorBoard event files to the run folder."""
    wandb: WandbConfig = Field(default_factory=WandbConfig)
    """Weights & Biases."""
    plot: bool = True
    """Draw the loss curve (PNG) into the run folder at the end, where matplotlib is installed."""
    samples: SamplesConfig = Field(default_factory=SamplesConfig)
    """Text that the model writes during training: in the log, in `samples.jsonl` of the run folder,
    in TensorBoard and Weights & Biases."""
    observers: list[ObserverConfig] = Field(default_factory=list)
    """Observers of your own: `module:Name`, or a section with `kind` and `options`. They are told
    in this order, before a step's metrics are logged: what they add is logged too."""


class RunConfig(Section):
    run: RunSection = Field(default_factory=RunSection)
    """Name, place and seed."""
    model: ModelConfig
    """The model."""
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    """How the model is spread over ranks."""
    pipeline: PipelineConfig = Field(default_factory=PipelineConfig)
    """Schedule and transport of the pipeline."""
    train: TrainSection
    """Batch, length and precision of training."""
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    """The optimizer."""
    lr_schedule: LRScheduleConfig = Field(default_factory=LRScheduleConfig)
    """The learning-rate schedule."""
    data: DataConfig = Field(default_factory=DataConfig)
    """Corpora and tokenizer."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """Saving and resuming."""
    log: LogConfig = Field(default_factory=LogConfig)
    """What is logged where."""
    observe: ObserveConfig = Field(default_factory=ObserveConfig)
    """What is looked at while the run trains (see docs/observing.md)."""
    stages: list[StageConfig] = Field(default_factory=list)
    """Parts of the run, one after the other, each with a name and values that take the place of
    those outside of `stages`; none: the run is one part (see docs/stages.md)."""

    @model_validator(mode="before")
    @classmethod
    def _whole_stages(cls, values: Any) -> Any:
        return completed(values) if isinstance(values, dict) else values

    @property
    def total_iters(self) -> int:
        """Steps of the whole run."""
        return sum(stage.train.train_iters for stage in self.stages) or self.train.train_iters
