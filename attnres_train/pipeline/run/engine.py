"""Engine: training and validation steps of one pipeline rank.

It makes the rank's program for each number of micro-batches, once and proved, and runs it (see
`execution`). One process is the plan with one chunk: nothing here asks for more than one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from attnres_train.pipeline.plan.program import Program
from attnres_train.pipeline.plan.schedule import Schedule, forward_only, one_f_one_b
from attnres_train.pipeline.plan.transport_plan import TransportPlan
from attnres_train.pipeline.run.execution import AroundLastBackward, Execution
from attnres_train.pipeline.run.stage import Batch, Chunk, Stage
from attnres_train.pipeline.run.transport import Transport


@dataclass(frozen=True)
class StepResult:
    loss: Tensor | None
    """Mean over micro-batches, scalar without graph; None but on the last chunk's rank."""
    p2p_bytes: int
    """Bytes that this rank sent."""
    peak_blocks: int
    """Most blocks in this rank's store at any time."""
    peak_bytes: int
    """Most memory that they kept alive."""
    waited_seconds: float
    """That the process was held up by what peers had not sent or taken yet."""


class Engine:
    """The chunks of pipeline rank ``rank``, driven by ``plan`` and a schedule.

    ``chunks`` maps chunk index to module. Blocks, partials and their gradients have
    ``stream_dtype`` and live on ``device``. ``debug`` sends each tensor's identity beside it and
    checks it on arrival. ``schedule(P, V, M)`` orders the passes. Micro-batches may differ in shape
    and number from call to call; for every new M the schedule is validated (ScheduleError).
    ``on_pass`` is called before each pass. ``share`` says which of T tokens are in the stream here
    (default: all).
    """

    def __init__(
        self,
        chunks: Mapping[int, Chunk],
        plan: TransportPlan,
        rank: int,
        transport: Transport,
        hidden_size: int,
        stream_dtype: torch.dtype,
        device: torch.device | str = "cpu",
        debug: bool = False,
        schedule: Callable[[int, int, int], Schedule] = one_f_one_b,
        on_pass: Callable[[], None] = lambda: None,
        share: Callable[[int], range] = range,
    ) -> None:
        self.stage = Stage(
            chunks, plan, rank, transport, hidden_size, stream_dtype, device, debug, on_pass, share
        )
        self.schedule = schedule
        self._programs: dict[tuple[Callable, int], Program] = {}

    def over(self, chunks: Mapping[int, Chunk], share: Callable[[int], range]) -> Engine:
        """The engine of other passes through the same pipeline: those of ``chunks``, with ``share``
        of the tokens in the stream."""
        stage = self.stage
        return Engine(
            chunks,
            stage.plan,
            stage.rank,
            stage.transport,
            stage.hidden_size,
            stage.stream_dtype,
            stage.device,
            stage.debug,
            on_pass=stage.on_pass,
            share=share,
        )

    def train_step(
        self, batches: Sequence[Batch], last_backward: AroundLastBackward = nullcontext
    ) -> StepResult:
        """Forward and backward of every micro-batch. Gradients of the mean of their losses are
        added to the parameters' ``.grad``. Each chunk's last backward pass, after which its
        gradients are whole, is made within ``last_backward(chunk)``."""
        return self._run(self.program(self.schedule, len(batches)), batches, last_backward)

    def evaluate(self, batches: Sequence[Batch]) -> StepResult:
        """The losses alone."""
        return self._run(self.program(forward_only, len(batches)), batches)

    def program(
        self, schedule: Callable[[int, int, int], Schedule], num_micro_batches: int
    ) -> Program:
        """The validated program of this rank, made once."""
        if num_micro_batches < 1:
            raise ValueError("a step needs at least one micro-batch")
        key = schedule, num_micro_batches
        if key not in self._programs:
            plan, layout = self.stage.plan, self.stage.plan.layout
            actions = schedule(layout.num_ranks, layout.num_virtual_stages, num_micro_batches)
            self._programs[key] = Program(plan, actions, self.stage.rank)
        return self._programs[key]

    def _run(
        self,
        program: Program,
        batches: Sequence[Batch],
        last_backward: AroundLastBackward = nullcontext,
    ) -> StepResult:
        sent_before = self.stage.transport.bytes_sent
        execution = Execution(self.stage, program, batches, last_backward)
        with torch.set_grad_enabled(program.training):
            execution.run()
        losses, store = execution.losses, execution.store
        return StepResult(
            loss=torch.stack(losses).mean(0) if losses else None,
            p2p_bytes=self.stage.transport.bytes_sent - sent_before,
            peak_blocks=store.peak_blocks,
            peak_bytes=store.peak_bytes,
            waited_seconds=execution.inbox.waited + execution.outbox.waited,
        )
