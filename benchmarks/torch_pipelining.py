"""The same chunks under torch.distributed.pipelining, with the full history on every hop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

from attnres_train.pipeline.plan.transport_plan import TransportPlan


class Stage(nn.Module):
    """A chunk as torch wants it: tensors in, tensors out; blocks by number, then the partial."""

    def __init__(self, plan: TransportPlan, index: int, chunk: nn.Module, batch: Any) -> None:
        super().__init__()
        self.plan, self.index, self.chunk, self.batch = plan, index, chunk, batch

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...] | Tensor:
        reads = self.plan.reads(self.index)
        tensors = () if self.index == 0 else tensors
        blocks = dict(zip(reads, tensors, strict=False))
        partial = tensors[-1] if len(tensors) > len(reads) else None
        output = self.chunk(self.batch, blocks, partial)
        if output.loss is not None:
            return output.loss.view(1)
        passed_on = [block.view_as(block) for block in blocks.values()]
        partials = [] if output.partial is None else [output.partial]
        return *passed_on, *output.blocks.values(), *partials


def make_stages(
    plan: TransportPlan, chunks: dict[int, nn.Module], batch: Any, hidden_size: int
) -> list[PipelineStage]:
    """Stages of one rank's ``chunks`` of ``plan``; every hop carries what the next chunk reads.
    Every micro-batch is ``batch``."""
    last = plan.layout.num_chunks - 1

    def examples(chunk: int) -> tuple[Tensor, ...]:
        if chunk == 0:
            return (batch.tokens,)
        if chunk > last:
            return (torch.zeros(1, requires_grad=True),)
        count = len(plan.reads(chunk)) + plan.hops[chunk - 1].partial
        shape = *batch.tokens.shape, hidden_size
        return tuple(torch.zeros(shape, requires_grad=True) for _ in range(count))

    return [
        PipelineStage(
            Stage(plan, index, chunk, batch),
            index,
            last + 1,
            torch.device("cpu"),
            input_args=examples(index),
            output_args=examples(index + 1),
        )
        for index, chunk in chunks.items()
    ]


def make_step(stages: list[PipelineStage], batches: list[Any]) -> Callable[[], object]:
    """A function that runs one training step."""
    options = {"n_microbatches": len(batches), "loss_fn": lambda output, _: output.sum()}
    if len(stages) == 1:
        schedule = Schedule1F1B(stages[0], **options)
    else:
        schedule = ScheduleInterleaved1F1B(stages, **options)
    inputs = (torch.cat([batch.tokens for batch in batches]),) if stages[0].is_first else ()
    target = {"target": torch.zeros(len(batches))} if stages[-1].is_last else {}
    return lambda: schedule.step(*inputs, **target, return_outputs=False)


def buffer_bytes(stages: list[PipelineStage]) -> int:
    """What the stages' receive buffers hold for the life of the schedule, after its first step."""
    buffers = {
        info.buffer.data_ptr(): info.buffer.nbytes
        for stage in stages
        for receives in (stage.args_recv_info, stage.grad_recv_info)
        for infos in receives.values()
        for info in infos
        if isinstance(getattr(info, "buffer", None), Tensor)
    }
    return sum(buffers.values())
