"""Observers: what is told of a run's progress, be it the console, a sink of ours or a class of the
user's that `log.observers` names.

Light at import (no torch): classes derived from `Observer` are found while a configuration is
loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from attnres_train.config.kinds import Kind
from attnres_train.config.schema import RunConfig

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn
    from torch.distributed import ProcessGroup

Record = dict[str, float]
"""What is logged of a step, flat: ``step, tokens, loss, grad_norm, lr, tokens_per_second,
step_seconds, p2p_bytes, memory_bytes``, ``expert_entropy, expert_violation, expert_rank_load,
expert_bytes`` of a model with experts, ``max_attention_logit`` with `optimizer.qk_clip` (the
largest scaled logit of MLA in the step, before clipping), ``mfu`` where the device's peak is known,
``validation_loss`` and ``validation_bits_per_byte`` after a validation (the latter where the bytes
that tokens stand for are known: docs/evaluation.md), of a mixture also ``validation_loss/<corpus>``
and ``validation_bits_per_byte/<corpus>`` (`data.labels`), ``skipped_steps`` once a step has been
passed over (their number so far; of such a step ``loss`` or ``grad_norm`` is not finite),
``loss_spikes`` likewise, ``stage`` (its number from 0) of a run in stages, and what observers of
the user's add. Of where the time went, see `training.clock`: ``data_share, compute_share,
wait_share, reduce_share, optimizer_share`` and, of a pipeline, ``bubble`` beside
``planned_bubble``; ``tflops`` of a device. On the main rank `course.Course` adds ``smoothed_loss,
time, wall_seconds, flops``. Loss in nats per token, of the whole step; ``grad_norm`` of the whole
model, before clipping; memory in bytes (sum of the processes on CPU, the largest device on CUDA);
how evenly tokens were spread over the experts as `model.moe.balance.Balance` says, and the bytes
that the ranks which share them sent each other."""


class Sample(NamedTuple):
    """A text of `log.samples`: what was given, and what the model went on with."""

    prompt: str
    text: str


@dataclass(frozen=True)
class RunInfo:
    """What is known of a run before its first step; ``info.json`` in its folder."""

    num_parameters: int
    """Of the whole model."""
    num_tokens: int
    """Training tokens of one epoch of every corpus."""
    unigram_entropy: float
    """Of the training tokens' distribution, nats per token: what a loss has to get below."""
    bytes_per_token: float | None = None
    """Of the text of the corpora, ends of documents left out; None where it was not counted."""


@dataclass(frozen=True)
class RunContext:
    """The run as one of its processes sees it."""

    config: RunConfig
    folder: Path
    """The run folder. It exists; what an observer writes goes there."""
    info: RunInfo
    rank: int
    """Of this process, 0 .. ``world_size`` - 1."""
    world_size: int
    pp_rank: int
    """Pipeline stage of this process."""
    dp_rank: int
    """Replica of the model that this process belongs to."""
    device: torch.device
    chunks: Mapping[int, nn.Module]
    """The model's chunks on this process by index, in model order. Names of their parameters are
    those of the released checkpoint without ``model.``, so with global layer numbers. Stacks of
    experts hold those of ``chunk.ports.exchange.experts``, and what tensor-parallel ranks share
    the part here (``chunk.ports.split``)."""
    counted: Set[nn.Parameter]
    """Those to be counted here in sums over the whole model: of all that hold the same, this is the
    first process."""
    control: ProcessGroup
    """All processes, for tensors and objects on the CPU: `torch.distributed` calls of an
    observer's own."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that logs and writes files: rank 0, with the first chunk."""
        return self.rank == 0


class Observer(Kind):
    """Base of observers: every hook does nothing unless a class defines it.

    Observers of the user's, in the order of `log.observers`, are told before those that log, so
    that what they add to a record is logged. They look on: parameters, gradients and the random
    number generators are the run's.

    An exception costs the run its observer and nothing else: it is told once, with its traceback,
    and the observer is told of nothing more. Two end the run, with a note that names observer and
    hook: a UserError, by which an observer ends it on purpose, and any of an observer that is
    `everywhere`, for the others may be waiting for it in a call of theirs.

    ``self.options`` are the checked options, ``self.run`` is the `RunContext`. The constructor also
    serves for checks before any process of the run exists: prepare in `on_start`.
    """

    everywhere: ClassVar[bool] = False
    """Whether there is one on every rank; else on the main rank alone. Those on every rank may use
    torch.distributed (over ``run.control``), if all of them make the same calls in the same order;
    not in `on_failure` and `on_end`, which others may not reach."""

    after_save: ClassVar[bool] = False
    """Whether `on_step_end` comes after the step is saved: for what only shows the record."""

    def __init__(self, section: Any, key: str, run: RunContext | None = None) -> None:
        super().__init__(section, key)
        self._run = run

    @property
    def run(self) -> RunContext:
        """Raises RuntimeError where there is no run: while a configuration is checked."""
        if self._run is None:
            raise RuntimeError(
                f"{self.key}: there is no run while the configuration is checked; what "
                f"{type(self).__name__} needs of it belongs into on_start"
            )
        return self._run

    def on_start(self, step: int) -> None:
        """The run begins, or resumes after ``step`` (0: from scratch)."""

    def on_step_begin(self, step: int) -> None:
        """Step ``step``, counted from 1, is about to begin."""

    def on_backward(self, step: int, chunks: Mapping[int, nn.Module]) -> None:
        """The gradients of step ``step`` are complete in ``.grad`` of the parameters of ``chunks``
        (those of `RunContext`): averaged over replicas, not yet clipped, parameters not updated.
        Time spent here counts as the step's. Who defines this has all replicas receive all of them,
        which else go to their owners alone (`optimizer.sharded`)."""

    def on_validation(self, step: int, loss: float) -> None:
        """Validation after step ``step`` came to ``loss``, nats per token."""

    def on_step_end(self, record: Record) -> None:
        """A step is done, validation included; every rank gets the same record.

        An observer of the user's may add numbers (int or float) under new names, e.g.
        ``record["grad_norm/embed_tokens"] = 0.5``: on the main rank they go to metrics.jsonl,
        TensorBoard and Weights & Biases, not into the console's line.
        """

    def on_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """What the model writes after ``step`` (`log.samples`); none but on the main rank."""

    def on_observation(self, step: int, arrays: dict[str, np.ndarray]) -> None:
        """A micro-batch of step ``step`` was looked at (`observe.interval`): ``arrays``, as in
        `attnres_train.observe.observed`. On the main rank alone, before `on_step_end`."""

    def on_save(self, step: int, path: Path) -> None:
        """The checkpoint of step ``step`` is complete in folder ``path``; told after a later step
        where `checkpoint.async_save` has it written meanwhile."""

    def on_roll_back(self, step: int) -> None:
        """The run has gone back to the checkpoint of ``step``, on every rank, after a loss spike:
        the steps after ``step`` come again, with other data."""

    def on_failure(self, error: Exception) -> None:
        """The run fails, on this rank, with ``error``; `on_end` follows. Other ranks may be ended
        without being told, or find that a peer is gone. Be brief: that this rank has failed is
        written down for the others afterwards."""

    def on_end(self) -> None:
        """The run ended, also by an error. Called for every observer whose `on_start` returned."""
