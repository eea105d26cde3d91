"""The engine on a toy model, all ranks in one process over mailboxes."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass
from threading import Condition

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attnres_train.config.schema import PipelineConfig
from attnres_train.pipeline.plan.layout import make_layout
from attnres_train.pipeline.plan.schedule import gpipe, one_f_one_b
from attnres_train.pipeline.plan.transport_plan import TransportPlan
from attnres_train.pipeline.run.engine import StepResult
from attnres_train.pipeline.run.transport import Transport
from tests.own_schedules import OneAtATime
from tests.pipeline.plan.layouts import layouts
from tests.pipeline.run.threads import first_of, run_ranks
from tests.pipeline.run.toy import HIDDEN_SIZE, toy_batches
from tests.pipeline.run.toy_runs import Recorder, make_chunks, make_engine, plain, train

LENGTHS = st.lists(st.integers(1, 4), min_size=1, max_size=7)


class Rendezvous:
    """A wire like gloo's: a send ends when its receive is posted, and only `wait` tells."""

    def __init__(self, transport: Transport, posted: Condition, counts: Counter) -> None:
        self.transport, self.posted, self.counts = transport, posted, counts
        self.sent = Counter()

    @property
    def bytes_sent(self) -> int:
        return self.transport.bytes_sent

    def send(self, channel, tensor):
        self.transport.send(channel, tensor)
        self.sent[channel] += 1
        return PostedBy(self, channel, self.sent[channel])

    def receive(self, channel, buffer):
        with self.posted:
            self.counts[channel] += 1
            self.posted.notify_all()
        return self.transport.receive(channel, buffer)


@dataclass
class PostedBy:
    wire: Rendezvous
    channel: tuple
    number: int

    def is_completed(self) -> bool:
        return False

    def wait(self) -> None:
        with self.wire.posted:
            if not self.wire.posted.wait_for(self._is_posted, timeout=300):
                raise RuntimeError("the receive was not posted")

    def _is_posted(self) -> bool:
        return self.wire.counts[self.channel] >= self.number


@settings(max_examples=25)
@given(layouts(), LENGTHS, st.sampled_from([one_f_one_b, gpipe]), st.booleans())
def test_any_layout_and_batch_gives_the_gradients_of_plain_autograd(
    layout, lengths, schedule, debug
):
    batches = toy_batches(lengths)
    loss, expected = plain(layout, batches)
    posted, counts = Condition(), Counter()
    results, found = train(
        layout,
        batches,
        wrap=lambda rank, transport: Rendezvous(transport, posted, counts),
        schedule=schedule,
        debug=debug,
    )
    assert first_of([r.loss for r in results]).item() == pytest.approx(loss, rel=1e-12)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-14)


@settings(max_examples=10)
@given(layouts(), LENGTHS)
def test_evaluation_gives_the_loss_and_leaves_nothing(layout, lengths):
    batches, chunks = toy_batches(lengths), make_chunks(layout)

    def evaluate(rank: int, transport: Transport) -> StepResult:
        return make_engine(layout, rank, transport, chunks).evaluate(batches)

    results = run_ranks(layout.num_ranks, evaluate)
    loss = first_of([result.loss for result in results])
    assert loss.item() == pytest.approx(plain(layout, batches)[0], rel=1e-12)
    assert all(p.grad is None for chunk in chunks.values() for p in chunk.parameters())
    sent = sum(result.p2p_bytes for result in results)
    tokens = sum(batch.tokens.numel() for batch in batches)
    assert sent == TransportPlan(layout).units().exact * tokens * HIDDEN_SIZE * 8


def test_a_block_that_needs_no_gradient_takes_those_that_come_back():
    layout, batches = make_layout(6, 3, 3, 1), toy_batches([2, 3])
    chunks, (_, expected) = make_chunks(layout), plain(layout, batches)
    chunks[0].embedding.requires_grad_(False)
    _, found = train(layout, batches, chunks)
    del expected["embedding"], found["embedding"]
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-14)


def test_a_step_without_micro_batches_is_refused():
    layout = make_layout(2, 2, 1, 1)
    with pytest.raises(ValueError, match="at least one micro-batch"):
        train(layout, [])


def test_a_schedule_of_the_users_own_gives_the_gradients_of_ours():
    layout, batches = make_layout(12, 4, 3, 2), toy_batches([2, 3, 1, 2, 4])
    loss, expected = plain(layout, batches)
    peaks = {}
    section = PipelineConfig(schedule="tests.own_schedules:OneAtATime")
    for schedule in (OneAtATime(section, "pipeline").schedule, one_f_one_b, gpipe):
        results, found = train(layout, batches, schedule=schedule)
        assert first_of([r.loss for r in results]).item() == pytest.approx(loss, rel=1e-12)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-14)
        peaks[schedule] = [result.peak_blocks for result in results]
    for alone, some, every in zip(*peaks.values(), strict=True):
        assert alone < some < every == len(batches) * alone


class Noting(nn.Module):
    """A chunk that notes when its passes begin and end; it takes in a partial and leaves one."""

    def __init__(self, chunk: nn.Module, events: list) -> None:
        super().__init__()
        self.chunk, self.events = chunk, events

    def forward(self, batch, blocks, partial, on_block):
        self.events.append("forward")
        partial.register_post_accumulate_grad_hook(lambda _: self.events.append("backward ends"))
        output = self.chunk(batch, blocks, partial, on_block)
        output.partial.register_hook(lambda _: self.events.append("backward"))
        self.events.append("forward ends")
        return output


def test_every_tensor_leaves_as_soon_and_is_waited_for_as_late_as_can_be():
    layout = make_layout(6, 3, 3, 1)  # rank 1 passes block 0 and 1 on, makes 2 and a partial
    chunks, events = make_chunks(layout), []
    chunks[1] = Noting(chunks[1], events)
    train(
        layout,
        toy_batches([3]),
        chunks,
        wrap=lambda rank, transport: Recorder(transport, events) if rank == 1 else transport,
    )
    assert events == [
        *["receive F"] * 3,  # all posted ahead: this rank's list has two actions
        *["receive B"] * 4,
        *["wait F", "send F"] * 2,  # passed on at once
        "wait F",
        "forward",
        "send F",  # block 2, of which the pass reads on
        "forward ends",
        "send F",
        "wait B",
        "backward",
        "wait B",  # the gradient of block 2
        "backward ends",
        "send B",
        *["wait B", "send B"] * 2,
    ]


def test_outputs_that_were_sent_are_freed_before_the_backward_pass():
    layout = make_layout(6, 4, 2, 1)
    chunks, alive = make_chunks(layout), []

    class Watched(nn.Module):
        def __init__(self, chunk: nn.Module) -> None:
            super().__init__()
            self.chunk, self.seen = chunk, []

        def forward(self, batch, blocks, partial, on_block):
            alive.append(sum(ref() is not None for ref in self.seen))
            output = self.chunk(batch, blocks, partial, on_block)
            memory = output.partial.untyped_storage()  # blocks share theirs with the store's
            self.seen += map(weakref.ref, (*output.blocks.values(), output.partial, memory))
            return output

    chunks[0] = Watched(chunks[0])
    train(layout, toy_batches([2] * 4), chunks, schedule=gpipe)
    assert alive == [0] * 4
