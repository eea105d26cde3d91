"""A toy pipeline in which one rank sleeps in the forward pass of its chunk."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch import nn

from attnres_train.pipeline.plan.layout import make_layout
from attnres_train.pipeline.plan.messages import channels
from attnres_train.pipeline.plan.transport_plan import TransportPlan
from attnres_train.pipeline.run.transport import P2PTransport
from attnres_train.supervise.board import Board
from attnres_train.supervise.recorder import Recorder
from tests.pipeline.run.toy import ToyChunk, toy_batches
from tests.pipeline.run.toy_runs import make_engine, train

TIMEOUT = timedelta(seconds=3)
"""Enough for all that a rank does between two messages, on a busy machine too."""


class Sleeping(nn.Module):
    """A chunk that sleeps over one micro-batch."""

    def __init__(self, chunk: nn.Module, seconds: float, batch: object) -> None:
        super().__init__()
        self.chunk, self.seconds, self.batch = chunk, seconds, batch

    def forward(self, batch, blocks, partial, on_block):
        if batch is self.batch:
            time.sleep(self.seconds)
        return self.chunk(batch, blocks, partial, on_block)


def train_beside_a_sleeper(sleeper: int, seconds: float, folder: Path) -> None:
    """A step of the toy model on all ranks, one chunk on each; rank ``sleeper`` sleeps for
    ``seconds`` in micro-batch 1."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    layout, pipeline = make_layout(8, 3, world_size, 1), range(world_size)
    # What torch imports in its first passes takes longer than `TIMEOUT` on a busy machine.
    train(layout, toy_batches([3]))
    dist.barrier()
    transport = P2PTransport(channels(TransportPlan(layout)), [pipeline], TIMEOUT)
    batches, chunk = toy_batches([3] * 4), ToyChunk(layout, rank)
    if rank == sleeper:
        chunk = Sleeping(chunk, seconds, batches[1])
    with Recorder(Board(folder, rank), pipeline, world_size).recorded():
        make_engine(layout, rank, transport, {rank: chunk}).train_step(batches)
