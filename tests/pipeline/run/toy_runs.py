"""Training steps of the toy model, all ranks in one process over mailboxes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attnres_train.pipeline.plan.layout import Layout
from attnres_train.pipeline.plan.transport_plan import TransportPlan
from attnres_train.pipeline.run.engine import Engine, StepResult
from attnres_train.pipeline.run.transport import Transport, Work
from tests.pipeline.run.threads import run_ranks
from tests.pipeline.run.toy import HIDDEN_SIZE, ToyBatch, ToyChunk, gradients


def make_engine(
    layout: Layout, rank: int, transport: Transport, chunks: dict[int, nn.Module], **options
) -> Engine:
    own = {index: chunks[index] for index in layout.chunks_of(rank)}
    return Engine(
        own, TransportPlan(layout), rank, transport, HIDDEN_SIZE, torch.float64, **options
    )


def make_chunks(layout: Layout) -> dict[int, nn.Module]:
    return {index: ToyChunk(layout, index) for index in range(layout.num_chunks)}


def train(
    layout: Layout,
    batches: list[ToyBatch],
    chunks: dict[int, nn.Module] | None = None,
    wrap: Callable[[int, Transport], Transport] = lambda rank, transport: transport,
    timeout: float = 300,
    **options,
) -> tuple[list[StepResult], dict[str, Tensor]]:
    """One training step on every rank: results by rank, and all gradients."""
    chunks = chunks or make_chunks(layout)
    results = run_ranks(
        layout.num_ranks,
        lambda rank, transport: make_engine(layout, rank, transport, chunks, **options).train_step(
            batches
        ),
        wrap=wrap,
        timeout=timeout,
    )
    return results, gradients(chunks.values())


def plain(layout: Layout, batches: list[ToyBatch]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients by autograd through one chunk with every sublayer."""
    whole = Layout(layout.blocks, (0, layout.bounds[-1]), 1, layout.sublayers_per_layer)
    chunk = ToyChunk(whole, 0)
    loss = sum(chunk(batch, {}, None).loss for batch in batches) / len(batches)
    loss.backward()
    return loss.item(), gradients([chunk])


class Recorder:
    """A transport that notes what it is asked for, and when its receives are waited for."""

    def __init__(self, transport: Transport, events: list) -> None:
        self.transport, self.events = transport, events

    @property
    def bytes_sent(self) -> int:
        return self.transport.bytes_sent

    def send(self, channel, tensor):
        self.events.append(f"send {channel.kind}")
        return self.transport.send(channel, tensor)

    def receive(self, channel, buffer):
        self.events.append(f"receive {channel.kind}")
        return Noted(self.transport.receive(channel, buffer), f"wait {channel.kind}", self.events)


@dataclass
class Noted:
    """Work that notes when it is waited for."""

    work: Work
    event: str
    events: list

    def is_completed(self) -> bool:
        return self.work.is_completed()

    def wait(self) -> None:
        self.events.append(self.event)
        self.work.wait()
