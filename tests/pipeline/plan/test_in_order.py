from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnres_train.pipeline.plan.in_order import (
    check_in_order,
    per_channel,
    per_pair,
    per_pair_and_kind,
)
from attnres_train.pipeline.plan.layout import Layout, make_layout
from attnres_train.pipeline.plan.program import Program
from attnres_train.pipeline.plan.schedule import Schedule, forward_only, gpipe, one_f_one_b
from attnres_train.pipeline.plan.transport_plan import TransportPlan
from attnres_train.pipeline.plan.validate import ScheduleError
from tests.pipeline.plan.layouts import layouts


def programs(layout: Layout, schedule: Schedule) -> list[Program]:
    plan = TransportPlan(layout)
    return [Program(plan, schedule, rank) for rank in range(layout.num_ranks)]


@settings(max_examples=300)
@given(layouts(), st.integers(1, 9), st.sampled_from([one_f_one_b, gpipe, forward_only]))
def test_a_group_per_directed_edge_and_kind_is_safe(layout, micro_batches, make):
    schedule = make(layout.num_ranks, layout.num_virtual_stages, micro_batches)
    check_in_order(programs(layout, schedule), per_channel)


@pytest.mark.parametrize(("ranks", "virtual"), [(2, 1), (2, 2), (3, 2), (4, 1), (4, 4)])
def test_one_communicator_per_pair_deadlocks(ranks, virtual):
    layout = make_layout(16, 3, ranks, virtual)
    with pytest.raises(ScheduleError, match=r"communicators deadlock.*\(chunk .* rank \d -> \d"):
        check_in_order(programs(layout, one_f_one_b(ranks, virtual, 4)), per_pair)


def test_one_communicator_per_pair_and_kind_deadlocks_on_two_ranks_only():
    with pytest.raises(ScheduleError, match="communicators deadlock"):
        check_in_order(programs(make_layout(16, 3, 2, 2), one_f_one_b(2, 2, 4)), per_pair_and_kind)
    check_in_order(programs(make_layout(16, 3, 4, 2), one_f_one_b(4, 2, 4)), per_pair_and_kind)


def test_receiving_in_another_order_than_sending_deadlocks():
    """The group is safe only because both ends issue its operations in the same order."""
    first, second = programs(make_layout(2, 2, 2, 1), forward_only(2, 1, 2))
    second.steps[0] = replace(second.steps[0], posted=second.steps[0].posted[::-1])
    told = r"block 1 for F\(chunk 1, micro-batch 0\), rank 0 -> 1"
    with pytest.raises(ScheduleError, match=told):
        check_in_order([first, second], per_channel)


def test_waiting_for_sends_at_once_deadlocks(monkeypatch):
    """Why `Program.due` looks at when the receiver runs: ranks that all wait for their own sends
    never come to where they post the receives of their peers'."""
    ring = programs(make_layout(16, 3, 4, 4), gpipe(4, 4, 16))
    check_in_order(ring, per_channel)
    monkeypatch.setattr(Program, "due", lambda *_: -1)
    with pytest.raises(ScheduleError, match="communicators deadlock"):
        check_in_order(ring, per_channel)
