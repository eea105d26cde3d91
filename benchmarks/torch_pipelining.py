"""The same chunks under torch.distributed.pipelining, with the full history on every hop."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

from attnres_train.pipeline.plan import TransportPlan
from chunks import Batch


class Stage(nn.Module):
    """A chunk as torch wants it: tensors in, tensors out; blocks by number, then the partial."""

    def __init__(self, plan: TransportPlan, index: int, chunk: nn.Module, tokens: Tensor) -> None:
        super().__init__()
        self.plan, self.index, self.chunk = plan, index, chunk
        self.batch = Batch(tokens)

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


def make_step(
    plan: TransportPlan,
    rank: int,
    chunks: dict[int, nn.Module],
    tokens: list[Tensor],
    hidden_size: int,
) -> Callable[[], object]:
    """A function that runs one training step; ``plan`` has the full history on every hop."""
    last = plan.layout.num_chunks - 1

    def examples(chunk: int) -> tuple[Tensor, ...]:
        if chunk == 0:
            return (tokens[0],)
        if chunk > last:
            return (torch.zeros(1, requires_grad=True),)
        count = len(plan.reads(chunk)) + plan.hops[chunk - 1].partial
        shape = *tokens[0].shape, hidden_size
        return tuple(torch.zeros(shape, requires_grad=True) for _ in range(count))

    stages = [
        PipelineStage(
            Stage(plan, index, chunk, tokens[0]),
            index,
            last + 1,
            torch.device("cpu"),
            input_args=examples(index),
            output_args=examples(index + 1),
        )
        for index, chunk in chunks.items()
    ]
    options = {"n_microbatches": len(tokens), "loss_fn": lambda output, _: output.sum()}
    if len(stages) == 1:
        schedule = Schedule1F1B(stages[0], **options)
    else:
        schedule = ScheduleInterleaved1F1B(stages, **options)
    inputs = (torch.cat(tokens),) if 0 in chunks else ()
    target = {"target": torch.zeros(len(tokens))} if last in chunks else {}
    return lambda: schedule.step(*inputs, **target, return_outputs=False)
