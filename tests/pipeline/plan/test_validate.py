from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnres_train.model.blocks import Blocks
from attnres_train.pipeline.plan.layout import Layout, even_bounds, make_layout
from attnres_train.pipeline.plan.schedule import Action, forward_only, gpipe, one_f_one_b
from attnres_train.pipeline.plan.transport_plan import TransportPlan
from attnres_train.pipeline.plan.validate import ScheduleError, validate
from tests.pipeline.plan.layouts import layouts


@settings(max_examples=300)
@given(layouts(), st.integers(1, 11), st.sampled_from([one_f_one_b, gpipe, forward_only]))
def test_every_schedule_passes_for_every_layout(layout, micro_batches, make_schedule):
    schedule = make_schedule(layout.num_ranks, layout.num_virtual_stages, micro_batches)
    report = validate(TransportPlan(layout), schedule)
    most = micro_batches * layout.blocks.num_blocks
    assert all(peak <= most for peak in report.peak_blocks)


def test_peak_of_the_48b_model_on_eight_ranks():
    """82 blocks of 4096 x 2304 in bf16 are 1.44 GiB."""
    layout = Layout(Blocks(54, 6), even_bounds(54, 32), 8, sublayers_per_layer=1)
    report = validate(TransportPlan(layout), one_f_one_b(8, 4, 32))
    assert max(report.peak_blocks) == 82


def test_peaks_by_hand():
    """Two ranks, plain 1F1B, a block per chunk: rank 0 holds the embedding and block 1 of two
    micro-batches; rank 1 the same two blocks, received, and block 2."""
    plan = TransportPlan(make_layout(2, 2, num_ranks=2, num_virtual_stages=1))
    report = validate(plan, one_f_one_b(2, 1, 4))
    assert report.peak_blocks == (4, 3)
    assert report.peak_partials == (0, 0)
    assert validate(plan, gpipe(2, 1, 4)).peak_blocks == (8, 12)
    assert validate(plan, forward_only(2, 1, 4)).peak_blocks == (2, 3)


def test_partials_are_counted_where_they_are_taken_in():
    plan = TransportPlan(make_layout(2, None, num_ranks=2, num_virtual_stages=1))
    report = validate(plan, gpipe(2, 1, 3))
    assert (report.peak_blocks, report.peak_partials) == ((0, 0), (0, 3))


@pytest.fixture
def plan() -> TransportPlan:
    return TransportPlan(make_layout(8, 4, num_ranks=4, num_virtual_stages=2))


def with_hop(plan: TransportPlan, index: int, **changes) -> TransportPlan:
    """``plan`` with one hop damaged."""
    hops = list(plan.hops)
    hops[index] = replace(hops[index], **changes)
    plan.hops = tuple(hops)
    return plan


def with_actions(schedule, rank: int, *actions: Action):
    return (*schedule[:rank], actions, *schedule[rank + 1 :])


def fault(plan: TransportPlan, schedule) -> str:
    with pytest.raises(ScheduleError) as error:
        validate(plan, schedule)
    return str(error.value)


def test_a_block_that_is_not_sent(plan):
    message = fault(with_hop(plan, 3, held=()), one_f_one_b(4, 2, 4))
    assert message == "rank 0: F(chunk 4, micro-batch 0): block 1 is not held, to read it"


def test_a_block_that_is_sent_twice(plan):
    message = fault(with_hop(plan, 4, held=(1,)), one_f_one_b(4, 2, 4))
    assert message == (
        "rank 1: F(chunk 5, micro-batch 0): block 1 is delivered but is held already"
    )


def test_a_block_that_the_sender_does_not_hold_yet(plan):
    message = fault(with_hop(plan, 1, held=(0, 1), fresh=()), one_f_one_b(4, 2, 4))
    assert message == (
        "rank 1: F(chunk 1, micro-batch 0): block 1 is not held, to send it before its pass"
    )


def test_a_lost_gradient(plan):
    assert plan.expected_deposits(0, 0) == 2  # chunk 4 reads the embedding, one hop took it away
    plan._deposits[0, 0] = 3
    message = fault(plan, one_f_one_b(4, 2, 4))
    assert message == ("rank 0: B(chunk 0, micro-batch 0): block 0 has 2 gradient deposits, not 3")


def test_a_deadlock_names_every_waiting_rank():
    plan = TransportPlan(make_layout(2, 2, num_ranks=2, num_virtual_stages=1))
    schedule = (
        (Action("F", 0, 0), Action("B", 0, 0), Action("F", 0, 1), Action("B", 0, 1)),
        (Action("F", 1, 0), Action("F", 1, 1), Action("B", 1, 0), Action("B", 1, 1)),
    )
    message = fault(plan, schedule)
    assert message.startswith("deadlock: ")
    assert "rank 0 before B(chunk 0, micro-batch 0)" in message
    assert "rank 1 before F(chunk 1, micro-batch 1)" in message


def test_actions_that_do_not_belong(plan):
    schedule = one_f_one_b(4, 2, 2)
    assert "rank 0: F(chunk 0, micro-batch 0): runs a second time" in fault(
        plan, with_actions(schedule, 0, schedule[0][0], *schedule[0])
    )
    assert "rank 3: F(chunk 0, micro-batch 0): another rank holds that chunk" in fault(
        plan, with_actions(schedule, 3, Action("F", 0, 0), *schedule[3])
    )
    assert "schedule for 2 ranks, layout for 4" in fault(plan, schedule[:2])


def test_a_backward_pass_before_its_forward_pass(plan):
    schedule = one_f_one_b(4, 2, 2)
    late = schedule[3].index(Action("B", 7, 0))
    moved = (schedule[3][late], *schedule[3][:late], *schedule[3][late + 1 :])
    message = fault(plan, with_actions(schedule, 3, *moved))
    assert message.startswith("deadlock: ")
    assert "rank 3 before B(chunk 7, micro-batch 0)" in message


def test_an_action_that_is_missing(plan):
    schedule = one_f_one_b(4, 2, 2)
    assert fault(plan, with_actions(schedule, 0, *schedule[0][:-1])) == (
        "B(chunk 0, micro-batch 1) is never run"
    )
