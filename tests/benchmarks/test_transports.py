"""Contestants of the pipeline benchmark carry what they are said to, and run in the engine."""

from __future__ import annotations

import time

import pytest
import torch

from attnres_train.model.blocks import Blocks
from attnres_train.pipeline.plan.layout import Layout, even_bounds
from attnres_train.pipeline.plan.schedule import one_f_one_b
from attnres_train.pipeline.plan.transport_plan import TransportPlan
from attnres_train.pipeline.plan.validate import validate
from tests.pipeline.run.threads import run_ranks

CONTESTANTS = {"NaivePlan": "naive", "PaddedPlan": "padded", "LatePlan": "exact"}


def layout(ranks: int, virtual: int) -> Layout:
    bounds = even_bounds(54, ranks * virtual)
    return Layout(Blocks(54, 6), bounds, ranks, sublayers_per_layer=1)


@pytest.mark.parametrize("shape", [(4, 2), (8, 2), (3, 1)])
@pytest.mark.parametrize("name", CONTESTANTS)
def test_contestants_carry_what_the_plan_counts_for_them(benchmarks, name, shape):
    import transports

    plan = getattr(transports, name)(layout(*shape))
    assert sum(hop.units for hop in plan.hops) == getattr(
        TransportPlan(plan.layout).units(), CONTESTANTS[name]
    )
    assert not any(hop.held for hop in plan.hops)
    validate(plan, one_f_one_b(*shape, 5))


@pytest.mark.parametrize("name", [*CONTESTANTS, "TransportPlan"])
def test_sleeping_chunks_run_in_the_engine_and_take_their_time(benchmarks, name):
    import transports
    from attnres_train.pipeline.run.engine import Engine
    from chunks import Batch, SleepingChunk

    plan, batches, seconds = getattr(transports, name)(layout(3, 2)), 4, 0.002
    batch = Batch(torch.zeros(1, 2, dtype=torch.long))

    def run(rank, transport):
        chunks = {c: SleepingChunk(plan, c, seconds, 8) for c in plan.layout.chunks_of(rank)}
        engine = Engine(chunks, plan, rank, transport, 8, torch.float32)
        return engine.train_step([batch] * batches)

    start = time.monotonic()
    results = run_ranks(3, run)
    assert time.monotonic() - start >= 3 * seconds * (2 * batches + 2)
    sent = sum(result.p2p_bytes for result in results)
    assert sent == 2 * batches * 2 * 8 * 4 * sum(hop.units for hop in plan.hops)
