from __future__ import annotations

import gc
import weakref

import pytest
import torch

from attnres_train.pipeline.plan.layout import make_layout
from attnres_train.pipeline.plan.messages import PipelineError
from attnres_train.pipeline.plan.transport_plan import TransportPlan
from attnres_train.pipeline.run.store import BlockStore

# 8 sublayers in blocks of 2 on 2 ranks x 2 virtual stages: chunk c completes block c + 1 (and chunk
# 0 the embedding); rank 0 holds chunks 0 and 2, rank 1 chunks 1 and 3.
PLAN = TransportPlan(make_layout(4, 2, 2, 2))


def make_store(rank: int = 0, training: bool = True) -> BlockStore:
    return BlockStore(PLAN, rank, training)


def read(store: BlockStore, micro_batch: int, block: int, factor: float = 1.0) -> None:
    """What a chunk does: use the leaf, then differentiate."""
    (factor * store.leaf(micro_batch, block)).sum().backward()


def test_a_leaf_shares_storage_and_collects_gradients_in_place():
    store, tensor = make_store(), torch.ones(2, 3, requires_grad=True) * 2
    store.put(0, 1, tensor)
    leaf = store.leaf(0, 1)
    assert leaf.is_leaf and leaf.requires_grad and leaf.data_ptr() == tensor.data_ptr()

    read(store, 0, 1, factor=3)
    gradient = leaf.grad
    store.deposit(0, 1, torch.full((2, 3), 0.5))
    assert leaf.grad is gradient
    assert torch.equal(store.release(0, 1), torch.full((2, 3), 3.5))


def test_a_peers_gradient_is_taken_over_without_a_copy():
    store, gradient = make_store(), torch.ones(3)
    store.put(0, 3, torch.zeros(3))
    store.deposit(0, 3, gradient)
    assert store.release(0, 3) is gradient


def test_a_second_delivery_is_an_error():
    store = make_store(rank=1)
    store.put(4, 1, torch.zeros(1))
    with pytest.raises(PipelineError, match="rank 1: block 1 of micro-batch 4, which chunk 1 br"):
        store.put(4, 1, torch.zeros(1))


def test_an_absent_block_is_an_error():
    with pytest.raises(PipelineError, match=r"block 2 of micro-batch 0.* is not held"):
        make_store().leaf(0, 2)


@pytest.mark.parametrize(("deposits", "message"), [(1, "with 1 gradient"), (3, "with 3 gradient")])
def test_the_count_of_gradients_is_checked_at_the_release(deposits, message):
    assert PLAN.expected_deposits(0, 1) == 2  # chunk 2 reads it, and the hop to chunk 1 returns one
    store = make_store()
    store.put(0, 1, torch.zeros(1))
    for _ in range(deposits - 1):
        read(store, 0, 1)
    store.deposit(0, 1, torch.zeros(1))
    with pytest.raises(PipelineError, match=f"rank 0: block 1 of micro-batch 0, .*{message}"):
        store.release(0, 1)


def test_several_uses_in_one_backward_pass_are_one_deposit():
    store = make_store()
    store.put(0, 1, torch.ones(1))
    (store.leaf(0, 1) + 2 * store.leaf(0, 1)).sum().backward()
    store.deposit(0, 1, torch.ones(1))
    assert store.release(0, 1).item() == 4


def test_a_block_that_nobody_reads_has_no_gradient():
    store = make_store(rank=1)
    assert PLAN.expected_deposits(1, 4) == 0  # the last block, completed by the last chunk
    store.put(0, 4, torch.zeros(1))
    assert store.release(0, 4) is None


def test_a_gradient_after_the_release_is_an_error():
    store = make_store()
    store.put(0, 1, torch.zeros(1))
    leaf = store.leaf(0, 1)
    read(store, 0, 1)
    read(store, 0, 1)
    store.release(0, 1)
    with pytest.raises(PipelineError, match=r"block 1 of micro-batch 0.*not held"):
        store.deposit(0, 1, torch.zeros(1))
    leaf.sum().backward()
    with pytest.raises(PipelineError, match=r"block 1 of micro-batch 0.*after its release"):
        store.assert_empty()


def test_what_is_left_at_the_end_is_named():
    store = make_store()
    store.assert_empty()
    store.put(3, 2, torch.zeros(1))
    with pytest.raises(
        PipelineError, match=r"rank 0: block 2 of micro-batch 3, which chunk 2.*held at the end"
    ):
        store.assert_empty()


def test_peaks_and_forward_only_passes():
    store = make_store(training=False)
    for micro_batch in (0, 1):
        for block in (0, 1):
            store.put(micro_batch, block, torch.zeros(4, dtype=torch.float64))
        assert not store.leaf(micro_batch, 0).requires_grad
    store.forget(0)
    assert not store.holds(0, 1) and store.holds(1, 1)
    store.forget(1)
    store.assert_empty()
    assert (store.peak_blocks, store.peak_bytes) == (4, 4 * 32)


def test_a_released_block_is_freed_without_the_garbage_collector():
    gc.disable()
    try:
        store = make_store()
        store.put(0, 1, torch.zeros(1))
        leaf = weakref.ref(store.leaf(0, 1))
        read(store, 0, 1)
        read(store, 0, 1)
        store.release(0, 1)
        assert leaf() is None
    finally:
        gc.enable()
