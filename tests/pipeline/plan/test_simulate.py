from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnres_train.model.blocks import Blocks
from attnres_train.pipeline.plan.layout import Layout, even_bounds, make_layout
from attnres_train.pipeline.plan.parts import MODES, parts
from attnres_train.pipeline.plan.schedule import forward_only, gpipe, one_f_one_b
from attnres_train.pipeline.plan.simulate import Costs, simulate
from attnres_train.pipeline.plan.transport_plan import TransportPlan
from tests.pipeline.plan.layouts import layouts


def flat_costs(plan: TransportPlan, unit: float) -> Costs:
    chunks = plan.layout.num_chunks
    return Costs([1.0] * chunks, [2.0] * chunks, unit)


@pytest.mark.parametrize(("ranks", "virtual", "micro_batches"), [(4, 1, 8), (4, 2, 8), (8, 4, 16)])
def test_bubble_of_1f1b_without_communication(ranks, virtual, micro_batches):
    """(P - 1) / (V M + P - 1) of the step is idle (arXiv 2104.04473, section 2.2)."""
    plan = TransportPlan(make_layout(64, None, ranks, virtual))
    schedule = one_f_one_b(ranks, virtual, micro_batches)
    timeline = simulate(plan, schedule, flat_costs(plan, 0.0), "standard")
    idle = (ranks - 1) / (virtual * micro_batches + ranks - 1)
    assert timeline.bubble == pytest.approx(idle)
    assert timeline.seconds == pytest.approx(3 * (virtual * micro_batches + ranks - 1))


def test_one_micro_batch_by_hand():
    """The embedding and block 1 travel to rank 1 and their gradients back, half a second each."""
    plan = TransportPlan(make_layout(2, 2, 2, 1))
    schedule = one_f_one_b(2, 1, 1)
    assert simulate(plan, schedule, flat_costs(plan, 0.5), "exact").seconds == 1 + 1 + 3 + 1 + 2
    assert simulate(plan, schedule, flat_costs(plan, 0.5), "standard").seconds == 6 + 2 * 0.5


def test_eager_forwarding_takes_the_history_off_the_critical_path():
    """Three ranks, a block per chunk. Block 0 (and its gradient) crosses 1 -> 2 beside compute:
    only what a chunk makes last, and its gradient, is ever waited for."""
    plan = TransportPlan(make_layout(3, 2, 3, 1))
    schedule, costs = one_f_one_b(3, 1, 1), flat_costs(plan, 0.25)
    # Forward: 0 -> 1 carries block 0, the embedding, and 1; 1 -> 2 carries 0, 1 (held) and 2.
    assert simulate(plan, schedule, costs, "exact").seconds == 9 + 2 * (2 + 3) * 0.25
    assert simulate(plan, schedule, costs, "eager").seconds == 9 + 2 * (1 + 1) * 0.25


def test_history_is_passed_on_block_by_block_as_it_comes():
    """The three ranks above, a unit costing two forward passes."""
    plan = TransportPlan(make_layout(3, 2, 3, 1))
    timeline = simulate(plan, one_f_one_b(3, 1, 1), flat_costs(plan, 2.0), "eager")
    sent = [(t.enables.kind, t.dst, t.part.blocks, t.start) for t in timeline.transfers]
    assert sorted(sent, key=lambda one: one[-1]) == [
        ("F", 1, (0,), 0),
        ("F", 1, (1,), 2),
        ("F", 2, (0,), 2),  # before block 1 is there, and the pass over
        ("F", 2, (1,), 4),
        ("F", 2, (2,), 6),
        ("B", 1, (2,), 11),  # what rank 1 starts from, then what it is to add to its own
        ("B", 1, (1,), 13),
        ("B", 1, (0,), 15),
        ("B", 0, (1,), 15),
        ("B", 0, (0,), 17),
    ]
    assert timeline.seconds == 19


@settings(max_examples=100)
@given(
    layouts(max_ranks=4, max_virtual_stages=3),
    st.integers(1, 6),
    st.sampled_from([one_f_one_b, gpipe, forward_only]),
    st.sampled_from(MODES),
    st.sampled_from([0.0, 0.1, 1.3]),
)
def test_every_pass_runs_and_every_unit_is_sent(layout, micro_batches, make, mode, unit):
    plan = TransportPlan(layout)
    schedule = make(layout.num_ranks, layout.num_virtual_stages, micro_batches)
    timeline = simulate(plan, schedule, flat_costs(plan, unit), mode)
    by_rank = [[p.action for p in timeline.passes if p.rank == r] for r in range(len(schedule))]
    assert by_rank == [list(actions) for actions in schedule]
    directions = 1 if make is forward_only else 2
    sent = sum(transfer.part.units for transfer in timeline.transfers)
    per_micro_batch = sum(part.units for hop in parts(plan, mode) for part in hop)
    assert sent == per_micro_batch * micro_batches * directions
    for rank in range(layout.num_ranks):
        port = [t for t in timeline.transfers if t.src == rank]
        assert all(a.end <= b.start + 1e-9 for a, b in pairwise(port))


def test_modes_send_what_the_plan_counts():
    plan = TransportPlan(make_layout(27, 6, 4, 2))
    units = plan.units()
    for mode in ("standard", "naive", "padded", "exact"):
        assert sum(part.units for hop in parts(plan, mode) for part in hop) == getattr(units, mode)
    assert sum(part.units for hop in parts(plan, "eager") for part in hop) == units.exact


def test_48b_on_eight_ranks():
    """Units of 18.9 MB at 50 GB/s and 40 % of an H100's peak: eager forwarding hides the history
    that costs the naive transport a quarter of the step or more."""
    layout = Layout(Blocks(54, 6), even_bounds(54, 32), 8, sublayers_per_layer=1)
    plan, schedule = TransportPlan(layout), one_f_one_b(8, 4, 32)
    per_sublayer = 2 * 2.9e9 * 4096 / 54 / (0.4 * 989e12)
    forward = [per_sublayer * len(layout.layers(chunk)) for chunk in range(32)]
    costs = Costs(forward, [2 * seconds for seconds in forward], 4096 * 2304 * 2 / 50e9)
    seconds = {mode: simulate(plan, schedule, costs, mode, record=False).seconds for mode in MODES}
    overhead = {mode: seconds[mode] / seconds["standard"] - 1 for mode in MODES}
    assert overhead["eager"] < 0.005 < overhead["exact"] < overhead["padded"] < overhead["naive"]
    assert overhead["naive"] > 0.2 and overhead["exact"] < 0.07
