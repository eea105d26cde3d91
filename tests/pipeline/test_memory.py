"""What stays in memory from step to step: nothing."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from attnres_train.pipeline.layout import make_layout
from attnres_train.pipeline.messages import channels
from attnres_train.pipeline.plan import TransportPlan
from attnres_train.pipeline.transport import P2PTransport
from tests.pipeline.toy import HIDDEN_SIZE, ToyChunk, toy_batches
from tests.pipeline.toy_runs import make_engine

STEPS, WARM_UP = 200, 20
TOKENS = 256
UNIT_BYTES = 2 * TOKENS * HIDDEN_SIZE * 8
LIMIT = (STEPS - WARM_UP) * UNIT_BYTES // 2
pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")


class Growth(NamedTuple):
    """Between step `WARM_UP` and step `STEPS`."""

    tensors: int
    """Python's."""
    resident_bytes: int
    """Of the process, whoever holds them."""


def growth(step: Callable[[], object]) -> Growth:
    """What ``step`` leaves behind, run `STEPS` times."""
    before = Growth(0, 0)
    for number in range(1, STEPS + 1):
        step()
        if number == WARM_UP:
            before = held()
    tensors, resident_bytes = held()
    return Growth(tensors - before.tensors, resident_bytes - before.resident_bytes)


def held() -> Growth:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    tensors = sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())
    return Growth(tensors, pages * os.sysconf("SC_PAGESIZE"))


def growth_of_a_rank() -> Growth:
    """Training and validation of two chunks on each of two ranks, over gloo."""
    layout, rank = make_layout(4, 3, 2, 2), dist.get_rank()
    transport = P2PTransport(channels(TransportPlan(layout)), [range(2)], timedelta(seconds=30))
    chunks = {index: ToyChunk(layout, index) for index in layout.chunks_of(rank)}
    engine, batches = make_engine(layout, rank, transport, chunks), toy_batches([TOKENS] * 2)

    def step() -> None:
        engine.train_step(batches)
        engine.evaluate(batches[:1])

    return growth(step)


def test_two_hundred_steps_leave_nothing_behind(pool):
    for found in pool.run(growth_of_a_rank, 2):
        assert found.tensors == 0
        assert found.resident_bytes < LIMIT  # half a unit a step


def test_growth_is_seen_in_tensors_and_in_what_is_none():
    tensors: list[Tensor] = []
    assert growth(lambda: tensors.append(torch.ones(1))).tensors == STEPS - WARM_UP
    others: list[bytes] = []
    found = growth(lambda: others.append(os.urandom(UNIT_BYTES)))
    assert found.tensors == 0
    assert found.resident_bytes > LIMIT
