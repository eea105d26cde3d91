"""The benchmark's real model computes the same under every contestant's transport plan."""

from __future__ import annotations

import time

import pytest
import torch

from attnres_train.pipeline.plan.transport_plan import TransportPlan
from attnres_train.pipeline.run.engine import Engine
from tests.pipeline.run.threads import first_of, run_ranks

RANKS, VIRTUAL, MICRO_BATCHES = 2, 2, 3


def loss_gradients_and_bytes(kind: type[TransportPlan], seconds: float | None = None):
    import small_model

    layout = small_model.layout(RANKS, VIRTUAL, small_model.BLOCK_SIZE)

    def run(rank, transport):
        plan = kind(layout)
        chunks = {
            c: small_model.make_chunk(plan, c, small_model.make_model(layout, c, seconds))
            for c in layout.chunks_of(rank)
        }
        engine = Engine(chunks, plan, rank, transport, small_model.HIDDEN_SIZE, torch.float32)
        result = engine.train_step([small_model.make_batch()] * MICRO_BATCHES)
        parameters = [p for chunk in chunks.values() for p in chunk.parameters()]
        gradients = [p.grad for p in parameters if p.grad is not None]
        return result.loss, gradients, result.p2p_bytes

    losses, gradients, sent = zip(*run_ranks(RANKS, run), strict=True)
    return first_of(losses), [g for of_rank in gradients for g in of_rank], sum(sent)


@pytest.mark.parametrize("name", ["NaivePlan", "PaddedPlan", "LatePlan"])
def test_contestants_agree(benchmarks, monkeypatch, name):
    import small_model
    import transports

    monkeypatch.setattr(small_model, "TOKENS", 16)
    loss, gradients, _ = loss_gradients_and_bytes(TransportPlan)
    plan = getattr(transports, name)
    other_loss, others, sent = loss_gradients_and_bytes(plan)
    torch.testing.assert_close(other_loss, loss)
    largest = max(gradient.norm() for gradient in gradients)
    for other, gradient in zip(others, gradients, strict=True):
        assert (other - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6 * largest
    layout = small_model.layout(RANKS, VIRTUAL, small_model.BLOCK_SIZE)
    unit = 16 * small_model.HIDDEN_SIZE * 4
    assert sent == 2 * MICRO_BATCHES * unit * sum(hop.units for hop in plan(layout).hops)


@pytest.mark.parametrize("name", ["TransportPlan", "LatePlan"])
def test_a_paced_model_computes_the_same_in_the_time_it_is_given(benchmarks, monkeypatch, name):
    import small_model
    import transports

    monkeypatch.setattr(small_model, "TOKENS", 16)
    plan, seconds = getattr(transports, name), 0.05
    loss, gradients, _ = loss_gradients_and_bytes(plan)
    start = time.monotonic()
    paced_loss, paced, _ = loss_gradients_and_bytes(plan, seconds)
    passes = MICRO_BATCHES * VIRTUAL + RANKS - 1  # in a row: M V of a rank's own, P - 1 to fill it
    assert time.monotonic() - start >= 3 * seconds * passes
    assert torch.equal(paced_loss, loss)
    for one, other in zip(paced, gradients, strict=True):
        assert torch.equal(one, other)
