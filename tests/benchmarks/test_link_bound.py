"""The bound of the pipeline benchmark is one, and close to what the order of sending reaches."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attnres_train.model.blocks import Blocks
from attnres_train.pipeline.plan.layout import Layout, even_bounds, make_layout
from attnres_train.pipeline.plan.schedule import gpipe, one_f_one_b
from attnres_train.pipeline.plan.simulate import Costs, simulate
from attnres_train.pipeline.plan.transport_plan import TransportPlan
from tests.pipeline.plan.layouts import layouts


def bound_and_simulated(layout, schedule, unit) -> tuple[float, float]:
    from link_bound import step_bound

    plan, chunks = TransportPlan(layout), layout.num_chunks
    costs = Costs([1.0] * chunks, [2.0] * chunks, unit)
    timeline = simulate(plan, schedule, costs, "eager", record=False, port_per_neighbour=True)
    return step_bound(plan, schedule, costs), timeline.seconds


def test_transfers_in_a_row(benchmarks):
    from link_bound import in_a_row

    assert in_a_row([0, 1, 3], 2) == 6
    assert in_a_row([4, 4, 4], 2) == 10
    assert in_a_row([0, 1, 10], 2) == 12  # the last one waits for no other


def test_one_micro_batch_leaves_nothing_to_order(benchmarks):
    """Three ranks, a block each (the transfers are those of the simulator's test)."""
    layout = make_layout(3, 2, 3, 1)
    assert bound_and_simulated(layout, one_f_one_b(3, 1, 1), 2.0) == (19, 19)


@pytest.mark.parametrize("micro_batches", [2, 4, 8])
def test_a_saturated_link_by_hand(benchmarks, micro_batches):
    """Embedding and block 1 of every micro-batch cross in a row. After the last of them there are
    a forward and a backward pass, the gradient of block 1, and the backward pass of rank 0."""
    schedule = one_f_one_b(2, 1, micro_batches)
    bound, simulated = bound_and_simulated(make_layout(2, 2, 2, 1), schedule, 4.0)
    assert simulated == bound >= 2 * micro_batches * 4 + 1 + 2 + 4 + 2


@settings(
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    layout=layouts(max_ranks=4, max_virtual_stages=3),
    micro_batches=st.integers(1, 6),
    make=st.sampled_from([one_f_one_b, gpipe]),
    unit=st.sampled_from([0.0, 0.1, 1.3, 4.0]),
)
def test_no_step_is_faster(benchmarks, layout, micro_batches, make, unit):
    schedule = make(layout.num_ranks, layout.num_virtual_stages, micro_batches)
    bound, simulated = bound_and_simulated(layout, schedule, unit)
    assert bound <= simulated + 1e-9
    assert bound >= 3 * layout.num_virtual_stages * micro_batches - 1e-9


@pytest.mark.parametrize("row", [(4, 2, 8), (4, 2, 32), (4, 4, 16), (8, 2, 16)])
def test_order_of_sending_is_within_5_percent_of_the_bound(benchmarks, row):
    """On the benchmark's layouts, with a unit that costs as much as a forward pass."""
    layout = Layout(Blocks(54, 6), even_bounds(54, row[0] * row[1]), row[0], sublayers_per_layer=1)
    bound, simulated = bound_and_simulated(layout, one_f_one_b(*row), 1.0)
    assert simulated < 1.05 * bound
