from __future__ import annotations

import pytest
from hypothesis import given, settings

from attnres_train.model.blocks import Blocks
from attnres_train.pipeline.plan.layout import Layout, even_bounds, make_layout
from attnres_train.pipeline.plan.parts import parts
from attnres_train.pipeline.plan.schedule import one_f_one_b
from attnres_train.pipeline.plan.transport_plan import TransportPlan, lower_bound
from attnres_train.pipeline.plan.validate import validate
from tests.pipeline.plan.layouts import layouts

PUBLISHED = {  # (P, V): standard, naive, exact = bound, padded, widest naive, widest exact
    (4, 1): (3, 18, 18, 24, 8, 8),
    (4, 2): (7, 42, 28, 35, 9, 5),
    (4, 4): (15, 92, 35, 45, 10, 3),
    (8, 2): (15, 92, 63, 90, 10, 6),
    (8, 4): (31, 200, 85, 124, 10, 4),
    (16, 2): (31, 200, 144, 186, 10, 6),
}


def blocks_complete_before(layout: Layout, chunk: int) -> set[int]:
    """Straight from the definition: blocks that end in an earlier chunk."""
    first = layout.sublayers(chunk).start
    ends = layout.blocks.ends
    return {block for block, end in enumerate(ends) if end < first} if chunk else set()


@pytest.mark.parametrize(("ranks", "virtual"), PUBLISHED)
def test_units_of_54_sublayers_in_9_blocks(ranks, virtual):
    bounds = even_bounds(54, ranks * virtual)
    plan = TransportPlan(Layout(Blocks(54, 6), bounds, ranks, sublayers_per_layer=1))
    units = plan.units()
    widest_naive = max(len(plan.reads(hop.dst_chunk)) + hop.partial for hop in plan.hops)
    widest_exact = max(hop.units for hop in plan.hops)
    figures = (units.standard, units.naive, units.exact, units.padded, widest_naive, widest_exact)
    assert figures == PUBLISHED[ranks, virtual]
    assert units.bound == units.exact


def test_figure_3_of_the_paper():
    """P = 4, V = 2, blocks of two chunks (arXiv 2603.15031 Fig. 3)."""
    plan = TransportPlan(make_layout(8, 4, num_ranks=4, num_virtual_stages=2))
    assert [hop.blocks for hop in plan.hops] == [(0,), (0, 1), (0, 1), (1, 2), (2,), (2, 3), (3,)]
    assert [hop.partial for hop in plan.hops] == [True, False] * 3 + [True]
    assert plan.hops[3].held == (1,) and plan.hops[3].fresh == (2,)
    second_virtual_stage = plan.hops[3:]
    assert sum(len(plan.reads(hop.dst_chunk)) for hop in second_virtual_stage) == 14
    assert sum(len(hop.blocks) for hop in second_virtual_stage) == 6
    assert plan.units().paper == (4 * 3 / 2 + 4**2) * 4 / 8


@settings(max_examples=500)
@given(layouts())
def test_exact_plan_meets_the_lower_bound(layout):
    """Against the bound for any placement, spelled out with sets of ranks."""
    rank_of, chunks = layout.rank_of, range(layout.num_chunks)
    bound = sum(
        layout.blocks.partial_after(layout.sublayers(chunk)[-1])
        for chunk in chunks[:-1]
        if rank_of(chunk) != rank_of(chunk + 1)
    )
    for end in layout.blocks.ends:
        producer = next(chunk for chunk in chunks if end <= layout.sublayers(chunk)[-1])
        bound += len({rank_of(chunk) for chunk in chunks if chunk > producer} - {rank_of(producer)})
    assert TransportPlan(layout).units().exact == lower_bound(layout) == bound


@settings(max_examples=300)
@given(layouts())
def test_a_hop_carries_exactly_what_the_receiver_lacks(layout):
    plan = TransportPlan(layout)
    holds = {rank: set() for rank in range(layout.num_ranks)}
    for chunk in range(layout.num_chunks):
        rank, before = layout.rank_of(chunk), blocks_complete_before(layout, chunk)
        hop = plan.hop_into(chunk)
        if hop:
            assert (hop.src_rank, hop.dst_rank) == (layout.rank_of(chunk - 1), rank)
            assert set(hop.held) <= blocks_complete_before(layout, hop.src_chunk)
            assert set(hop.fresh) <= set(plan.produced(hop.src_chunk))
            assert set(hop.blocks) == before - holds[rank]
            assert hop.partial == layout.blocks.partial_after(layout.sublayers(chunk).start - 1)
            assert hop.units == (0 if hop.is_local else len(hop.blocks) + hop.partial)
        assert set(plan.reads(chunk)) == before
        holds[rank] |= before | set(plan.produced(chunk))
        for block in (*plan.received(chunk), *plan.produced(chunk)):
            assert plan.bring[rank, block] == chunk
    assert set(plan.bring) == {(rank, block) for rank in holds for block in holds[rank]}


@settings(max_examples=300)
@given(layouts())
def test_deposits_are_readers_on_the_rank_plus_hops_that_carried_the_block_away(layout):
    plan = TransportPlan(layout)
    for rank, block in plan.bring:
        chunks = layout.chunks_of(rank)
        readers = [chunk for chunk in chunks if block in plan.reads(chunk)]
        carried = sum(hop.src_rank == rank and block in hop.blocks for hop in plan.hops)
        assert plan.expected_deposits(rank, block) == len(readers) + carried
        assert carried <= 1


def test_standard_residual_carries_the_partial_alone():
    units = TransportPlan(make_layout(6, None, num_ranks=3, num_virtual_stages=2)).units()
    assert (units.standard, units.naive, units.padded, units.exact, units.bound) == (5,) * 5
    assert units.paper == 0


def test_a_partial_may_be_several_units():
    """P = 4, V = 2, blocks of two chunks: every other hop has a partial, and one of two units more
    wherever a partial crosses."""
    one, two = (TransportPlan(make_layout(8, 4, 4, 2, partial_units=units)) for units in (1, 2))
    more = [b.units - a.units for a, b in zip(one.hops, two.hops, strict=True)]
    assert more == [hop.partial for hop in two.hops] == [True, False] * 3 + [True]
    for name in ("naive", "exact", "bound"):
        assert getattr(two.units(), name) == getattr(one.units(), name) + 4
    assert two.units().standard == one.units().standard
    for plan in (one, two):
        sent = [sum(part.units for part in of) for of in parts(plan, "eager")]
        assert sent == [hop.units for hop in plan.hops]
    reports = [validate(plan, one_f_one_b(4, 2, 4)) for plan in (one, two)]
    assert reports[0].peak_blocks == reports[1].peak_blocks
    assert reports[1].peak_partials == tuple(2 * peak for peak in reports[0].peak_partials)


def test_one_rank_sends_nothing():
    plan = TransportPlan(make_layout(6, 3, num_ranks=1, num_virtual_stages=3))
    assert [hop.blocks for hop in plan.hops] == [(), ()]
    assert [hop.partial for hop in plan.hops] == [True, True]
    assert plan.units().exact == plan.units().bound == plan.units().naive == 0
    assert plan.bring == {(0, 0): 0, (0, 1): 0, (0, 2): 1, (0, 3): 2, (0, 4): 2}


def test_full_attention_residuals_send_every_sublayer():
    plan = TransportPlan(make_layout(4, 1, num_ranks=2, num_virtual_stages=2))
    assert [hop.blocks for hop in plan.hops] == [(0, 1, 2), (3, 4), (5, 6)]
    assert not any(hop.partial for hop in plan.hops)


def test_a_thousand_stages_are_planned_in_moments():
    plan = TransportPlan(make_layout(1024, 16, num_ranks=128, num_virtual_stages=8))
    assert plan.units().exact == plan.units().bound == 16207
