"""The engine on a toy model, all ranks in one process over mailboxes."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from threading import Condition

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from attnres_train.pipeline.engine import Engine, StepResult
from attnres_train.pipeline.layout import Layout, make_layout
from attnres_train.pipeline.messages import PeerError, PipelineError
from attnres_train.pipeline.plan import TransportPlan
from attnres_train.pipeline.schedule import gpipe, one_f_one_b
from attnres_train.pipeline.store import BlockStore
from attnres_train.pipeline.transport import Transport
from tests.pipeline.layouts import layouts
from tests.pipeline.threads import first_of, run_ranks
from tests.pipeline.toy import HIDDEN_SIZE, ToyBatch, ToyChunk, gradients, toy_batches

LAYOUT = make_layout(8, 3, 2, 1)
LENGTHS = st.lists(st.integers(1, 4), min_size=1, max_size=7)


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
    timeout: float = 10,
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
            if not self.wire.posted.wait_for(self._is_posted, timeout=10):
                raise RuntimeError("the receive was not posted")

    def _is_posted(self) -> bool:
        return self.wire.counts[self.channel] >= self.number


@settings(deadline=None, max_examples=25)
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


@settings(deadline=None, max_examples=10)
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


def test_a_step_without_micro_batches_is_refused():
    layout = make_layout(2, 2, 1, 1)
    with pytest.raises(ValueError, match="at least one micro-batch"):
        train(layout, [])


class Recorder:
    """A transport that notes what it is asked for."""

    def __init__(self, transport: Transport, events: list) -> None:
        self.transport, self.events = transport, events

    @property
    def bytes_sent(self) -> int:
        return self.transport.bytes_sent

    def send(self, channel, tensor):
        self.events.append(f"send {channel.kind} {channel.urgency}")
        return self.transport.send(channel, tensor)

    def receive(self, channel, buffer):
        self.events.append(f"receive {channel.kind} {channel.urgency}")
        return self.transport.receive(channel, buffer)


class Noting(nn.Module):
    """A chunk that notes when it is computed, forward and backward."""

    def __init__(self, chunk: nn.Module, events: list) -> None:
        super().__init__()
        self.chunk, self.events = chunk, events

    def forward(self, batch, blocks, partial):
        self.events.append("forward")
        if partial is not None:
            partial.register_post_accumulate_grad_hook(lambda _: self.events.append("backward"))
        return self.chunk(batch, blocks, partial)


def test_held_blocks_leave_before_the_compute_and_fresh_tensors_behind_it():
    layout = make_layout(6, 3, 3, 1)  # rank 1 passes block 0 and 1 on, makes 2 and a partial
    chunks, events = make_chunks(layout), []
    chunks[1] = Noting(chunks[1], events)
    train(
        layout,
        toy_batches([3]),
        chunks,
        wrap=lambda rank, transport: Recorder(transport, events) if rank == 1 else transport,
    )
    hops = TransportPlan(layout).hops
    assert [(len(hop.held), len(hop.fresh), hop.partial) for hop in hops] == [
        (0, 2, True),
        (2, 1, True),
    ]
    receives = ["receive F fresh"] * 3 + ["receive B fresh"] * 2 + ["receive B held"] * 2
    assert events == [
        *receives,  # all posted ahead: this rank's list has two actions
        *["send F held"] * 2,
        "forward",
        *["send F fresh"] * 2,
        "backward",
        *["send B fresh"] * 3,
    ]


def test_outputs_that_were_sent_are_freed_before_the_backward_pass():
    layout = make_layout(6, 4, 2, 1)
    chunks, alive = make_chunks(layout), []

    class Watched(nn.Module):
        def __init__(self, chunk: nn.Module) -> None:
            super().__init__()
            self.chunk, self.seen = chunk, []

        def forward(self, batch, blocks, partial):
            alive.append(sum(ref() is not None for ref in self.seen))
            output = self.chunk(batch, blocks, partial)
            self.seen += map(weakref.ref, (*output.blocks.values(), output.partial))
            return output

    chunks[0] = Watched(chunks[0])
    train(layout, toy_batches([2] * 4), chunks, schedule=gpipe)
    assert alive == [0] * 4


def test_steps_leave_no_tensor_behind():
    layout = make_layout(6, 3, 3, 2)
    chunks, counts = make_chunks(layout), []

    def run(rank: int, transport: Transport) -> None:
        engine = make_engine(layout, rank, transport, chunks)
        for step in range(7):
            engine.train_step(toy_batches([1 + step % 3] * 4))
            engine.evaluate(toy_batches([2]))

    for _ in range(3):
        run_ranks(3, run)
        gc.collect()
        counts.append(sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()))
    assert counts[0] == counts[1] == counts[2]


class Dropping(nn.Module):
    """A chunk that gives one tensor of one micro-batch no gradient."""

    def __init__(self, chunk: nn.Module, batch: ToyBatch, block: int | None) -> None:
        super().__init__()
        self.chunk, self.batch, self.block = chunk, batch, block

    def forward(self, batch, blocks, partial):
        if batch is self.batch and self.block is None:
            partial = partial.detach()
        elif batch is self.batch:
            blocks = blocks | {self.block: blocks[self.block].detach()}
        return self.chunk(batch, blocks, partial)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (1, r"rank 0: block 1 of micro-batch 2, which chunk 0 .* with 1 gradient deposits, not 2"),
        (None, r"rank 0: B\(chunk 2, micro-batch 2\): .*incoming partial no gradient"),
    ],
)
def test_a_dropped_gradient_is_found(block, message):
    layout = make_layout(8, 3, 2, 2)
    chunks, batches = make_chunks(layout), toy_batches([2] * 4)
    chunks[2] = Dropping(chunks[2], batches[2], block)
    with pytest.raises(PipelineError, match=message):
        train(layout, batches, chunks)


class Done:
    """A send that has nothing left to do."""

    def is_completed(self) -> bool:
        return True

    def wait(self) -> None:
        pass


class Reordering(Recorder):
    """A wire that gathers the first four tensors of a channel and sends them in another order."""

    def __init__(self, transport: Transport, channel: tuple, order: list[int]) -> None:
        super().__init__(transport, [])
        self.channel, self.order, self.gathered = channel, order, []

    def send(self, channel, tensor):
        if channel != self.channel or len(self.gathered) == 4:
            return self.transport.send(channel, tensor)
        self.gathered.append(tensor.clone())
        if len(self.gathered) == 4:
            for index in self.order:
                self.transport.send(channel, self.gathered[index])
        return Done()


def train_reordered(
    channel: tuple, order: list[int], batches: list[ToyBatch], debug: bool, timeout: float = 10
) -> dict[str, Tensor]:
    """Gradients of a step with one faulty channel, on 16 sublayers in blocks of 3 on two ranks: the
    only hop carries blocks 0, 1, 2 and a partial, in this order, their gradients in reverse."""

    def wrap(rank: int, transport: Transport) -> Transport:
        return Reordering(transport, channel, order) if rank == channel[0] else transport

    return train(LAYOUT, batches, wrap=wrap, debug=debug, timeout=timeout)[1]


FORWARD, BACKWARD = (0, 1, "F", "fresh"), (1, 0, "B", "fresh")
SWAPPED, DOUBLED = [2, 3, 0, 1], [0, 1, 0, 1, 2, 3]  # each tensor with its identity before it


@pytest.mark.parametrize(
    ("channel", "order", "message"),
    [
        (
            FORWARD,
            SWAPPED,
            r"rank 1: rank 0 sent block 1 of micro-batch 0 for chunk 1 in the place of block 0 for "
            r"F\(chunk 1, micro-batch 0\)",
        ),
        (
            FORWARD,
            DOUBLED,
            r"rank 1: rank 0 sent block 0 of micro-batch 0 for chunk 1 in the place of block 1 for "
            r"F\(chunk 1, micro-batch 0\)",
        ),
        (
            BACKWARD,
            SWAPPED,
            r"rank 0: rank 1 sent block 2 of micro-batch 0 for chunk 0 in the place of the "
            r"gradient of the partial for B\(chunk 0, micro-batch 0\)",
        ),
    ],
)
def test_debug_mode_finds_tensors_that_are_swapped_or_come_twice(channel, order, message):
    with pytest.raises(PipelineError, match=message):
        train_reordered(channel, order, toy_batches([2] * 4), debug=True)


def test_without_debug_mode_a_swap_runs_on_with_wrong_gradients():
    batches = toy_batches([2])
    _, expected = plain(LAYOUT, batches)
    found = train_reordered(FORWARD, [1, 0, 2, 3], batches, debug=False)
    assert any((found[name] - expected[name]).norm() > 1e-3 for name in found)


def test_a_tensor_that_never_comes_is_named_with_all_that_is_known_of_it():
    message = (
        r"rank 0 could not start or finish B\(chunk 0, micro-batch 0\): it waited 0\.\d s "
        r"\(posted \d\.\d s ago\) for the gradient of block 0 for B\(chunk 0, micro-batch 0\), "
        r"256 bytes, from rank 1 over its fresh channel; also outstanding: nothing"
    )
    with pytest.raises(PeerError, match=message):
        train_reordered(BACKWARD, [0, 1, 2], toy_batches([2]), debug=False, timeout=0.5)


def test_a_late_release_is_found(monkeypatch):
    release = BlockStore.release

    def forgetful(store: BlockStore, micro_batch: int, block: int) -> Tensor | None:
        if (store._rank, micro_batch, block) != (1, 2, 1):
            return release(store, micro_batch, block)
        return store.leaf(micro_batch, block).grad

    monkeypatch.setattr(BlockStore, "release", forgetful)
    with pytest.raises(
        PipelineError, match=r"rank 1: block 1 of micro-batch 2, which chunk 1 .* end"
    ):
        train(LAYOUT, toy_batches([2] * 4))


class Wrong(nn.Module):
    """A chunk whose output is changed by ``change``."""

    def __init__(self, chunk: nn.Module, change: Callable) -> None:
        super().__init__()
        self.chunk, self.change = chunk, change

    def forward(self, batch, blocks, partial):
        output = self.chunk(batch, blocks, partial)
        self.change(output)
        return output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda o: o.blocks.pop(1),
            r"F\(chunk 0, micro-batch 0\): .* blocks \[0, 2\], not \[0, 1, 2\]",
        ),
        (lambda o: setattr(o, "partial", None), r"F\(chunk 0, .* plan has partial=True"),
        (
            lambda o: setattr(o, "partial", o.partial.float()),
            r"rank 0: the partial for F\(chunk 1, .* is torch.float32, but the stream is torch",
        ),
    ],
)
def test_output_that_does_not_fit_the_plan_is_refused(change, message):
    chunks = make_chunks(LAYOUT)
    chunks[0] = Wrong(chunks[0], change)
    with pytest.raises(PipelineError, match=message):
        train(LAYOUT, toy_batches([2]), chunks)
