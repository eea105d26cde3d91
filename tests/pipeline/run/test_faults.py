"""Faults that are put into a step on purpose, and the message that each is found with."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor, nn

from attnres_train.pipeline.plan.layout import make_layout
from attnres_train.pipeline.plan.messages import PipelineError
from attnres_train.pipeline.run.store import BlockStore
from attnres_train.pipeline.run.transport import Transport
from attnres_train.pipeline.run.waits import PeerError
from tests.pipeline.run.toy import ToyBatch, toy_batches
from tests.pipeline.run.toy_runs import Recorder, make_chunks, plain, train

LAYOUT = make_layout(8, 3, 2, 1)


class Dropping(nn.Module):
    """A chunk that gives one tensor of one micro-batch no gradient."""

    def __init__(self, chunk: nn.Module, batch: ToyBatch, block: int | None) -> None:
        super().__init__()
        self.chunk, self.batch, self.block = chunk, batch, block

    def forward(self, batch, blocks, partial, on_block):
        if batch is self.batch and self.block is None:
            partial = partial.detach()
        elif batch is self.batch:
            blocks = blocks | {self.block: blocks[self.block].detach()}
        return self.chunk(batch, blocks, partial, on_block)


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
    channel: tuple, order: list[int], batches: list[ToyBatch], debug: bool, timeout: float = 300
) -> dict[str, Tensor]:
    """Gradients of a step with one faulty channel, on 16 sublayers in blocks of 3 on two ranks: the
    only hop carries blocks 0, 1, 2 and a partial, in this order, their gradients in reverse."""

    def wrap(rank: int, transport: Transport) -> Transport:
        return Reordering(transport, channel, order) if rank == channel[0] else transport

    return train(LAYOUT, batches, wrap=wrap, debug=debug, timeout=timeout)[1]


FORWARD, BACKWARD = (0, 1, "F"), (1, 0, "B")
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
        r"rank 0 waited \d+\.\d s in vain: the gradient of block 0 for B\(chunk 0, micro-batch "
        r"0\), 256 bytes, from rank 1 in B\(chunk 1, micro-batch 0\) \(0 others were under way\)"
    )
    with pytest.raises(PeerError, match=message):
        train_reordered(BACKWARD, [0, 1, 2], toy_batches([2]), debug=False, timeout=2)


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

    def forward(self, batch, blocks, partial, on_block):
        output = self.chunk(batch, blocks, partial, on_block)
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
