"""What stays in memory from step to step: nothing."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable
from datetime import timedelta
from typing import ClassVar, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from attnres_train.pipeline.plan.layout import make_layout
from attnres_train.pipeline.plan.messages import channels
from attnres_train.pipeline.plan.transport_plan import TransportPlan
from attnres_train.pipeline.run.transport import P2PTransport
from tests.pipeline.run.toy import HIDDEN_SIZE, ToyChunk, toy_batches
from tests.pipeline.run.toy_runs import make_engine

STEPS, WARM_UP = 200, 20
TOKENS = 256
UNIT_BYTES = 2 * TOKENS * HIDDEN_SIZE * 8
LIMIT = 8 * UNIT_BYTES
LIBC = ctypes.CDLL(None)
pytestmark = pytest.mark.skipif(not hasattr(LIBC, "mallinfo2"), reason="asks glibc's malloc")


class MallocInfo(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_: ClassVar = [(name, ctypes.c_size_t) for name in names.split()]


class Held(NamedTuple):
    """What is alive, or by how much more than before."""

    tensors: int
    """Python's."""
    num_bytes: int
    """Allocated and not freed, whoever holds them."""


def held() -> Held:
    gc.collect()
    LIBC.mallinfo2.restype = MallocInfo
    info = LIBC.mallinfo2()
    tensors = sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())
    return Held(tensors, info.uordblks + info.hblkhd)


def growth(step: Callable[[], object]) -> Held:
    """What ``step`` leaves behind from its call number `WARM_UP` to number `STEPS`."""
    before = held()
    for number in range(1, STEPS + 1):
        step()
        if number == WARM_UP:
            before = held()
    return Held(*(end - start for end, start in zip(held(), before, strict=True)))


def growth_of_a_rank() -> Held:
    """Training and validation of a chunk on each of two ranks, over gloo."""
    layout, rank = make_layout(2, 3, 2, 1), dist.get_rank()
    transport = P2PTransport(channels(TransportPlan(layout)), [range(2)], timedelta(seconds=300))
    chunks = {index: ToyChunk(layout, index) for index in layout.chunks_of(rank)}
    engine, batches = make_engine(layout, rank, transport, chunks), toy_batches([TOKENS] * 2)

    def step() -> None:
        engine.train_step(batches)
        engine.evaluate(batches[:1])

    return growth(step)


def test_two_hundred_steps_leave_nothing_behind(pool):
    for found in pool.run(growth_of_a_rank, 2):
        assert found.tensors == 0
        assert found.num_bytes < LIMIT


def test_growth_is_seen_in_tensors_and_in_what_is_none():
    tensors: list[Tensor] = []
    assert growth(lambda: tensors.append(torch.ones(1))).tensors == STEPS - WARM_UP
    others: list[bytes] = []
    found = growth(lambda: others.append(os.urandom(UNIT_BYTES)))
    assert found.tensors == 0
    assert found.num_bytes > LIMIT
