from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnres_train.pipeline.in_order import (
    check_in_order,
    per_edge_and_kind,
    per_edge_kind_and_urgency,
    per_pair,
    per_pair_and_kind,
)
from attnres_train.pipeline.layout import make_layout
from attnres_train.pipeline.plan import TransportPlan
from attnres_train.pipeline.schedule import forward_only, gpipe, one_f_one_b
from attnres_train.pipeline.validate import ScheduleError
from tests.pipeline.layouts import layouts


@settings(max_examples=300, deadline=None)
@given(
    layouts(),
    st.integers(1, 9),
    st.sampled_from([one_f_one_b, gpipe, forward_only]),
    st.sampled_from([per_edge_and_kind, per_edge_kind_and_urgency]),
    st.booleans(),
)
def test_a_group_per_directed_edge_and_kind_is_safe(layout, micro_batches, make, groups, eager):
    schedule = make(layout.num_ranks, layout.num_virtual_stages, micro_batches)
    check_in_order(TransportPlan(layout), schedule, groups, eager=eager)


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize(("ranks", "virtual"), [(2, 1), (2, 2), (3, 2), (4, 1), (4, 4)])
def test_one_communicator_per_pair_deadlocks(ranks, virtual, eager):
    plan = TransportPlan(make_layout(16, 3, ranks, virtual))
    with pytest.raises(ScheduleError, match=r"communicators deadlock.*hop \d+ -> \d+"):
        check_in_order(plan, one_f_one_b(ranks, virtual, 4), per_pair, eager=eager)


@pytest.mark.parametrize("eager", [True, False])
def test_one_communicator_per_pair_and_kind_deadlocks_on_two_ranks_only(eager):
    two = TransportPlan(make_layout(16, 3, 2, 2))
    with pytest.raises(ScheduleError, match="communicators deadlock"):
        check_in_order(two, one_f_one_b(2, 2, 4), per_pair_and_kind, eager=eager)
    four = TransportPlan(make_layout(16, 3, 4, 2))
    check_in_order(four, one_f_one_b(4, 2, 4), per_pair_and_kind, eager=eager)


def test_receiving_in_another_order_than_sending_deadlocks():
    """Rank 1 takes micro-batch 1 first; the group is safe only because orders agree."""
    plan = TransportPlan(make_layout(2, 2, 2, 1))
    first, second = forward_only(2, 1, 2)
    with pytest.raises(ScheduleError) as error:
        check_in_order(plan, (first, second[::-1]), per_edge_and_kind)
    assert "fresh blocks of hop 0 -> 1, micro-batch 1, rank 0 -> 1" in str(error.value)
