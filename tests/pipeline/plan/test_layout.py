from __future__ import annotations

from itertools import chain, combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnres_train.errors import UserError
from attnres_train.model.blocks import Blocks
from attnres_train.pipeline.plan.layout import Layout, balanced_bounds, even_bounds, make_layout
from tests.pipeline.plan.layouts import layouts


@given(layouts())
def test_chunks_partition_the_model_over_the_ranks(layout):
    sublayers = [s for chunk in range(layout.num_chunks) for s in layout.sublayers(chunk)]
    assert sublayers == list(range(1, layout.blocks.num_sublayers + 1))
    by_rank = {rank: list(layout.chunks_of(rank)) for rank in range(layout.num_ranks)}
    assert sorted(chain.from_iterable(by_rank.values())) == list(range(layout.num_chunks))
    for rank, chunks in by_rank.items():
        assert [layout.rank_of(chunk) for chunk in chunks] == [rank] * layout.num_virtual_stages
        assert [layout.virtual_stage(chunk) for chunk in chunks] == list(range(len(chunks)))


@given(st.integers(1, 200), st.integers(1, 200))
def test_even_chunks_differ_by_one_layer_at_most_and_the_last_is_a_smallest(num_layers, num_chunks):
    num_layers = max(num_layers, num_chunks)
    bounds = even_bounds(num_layers, num_chunks)
    sizes = [end - start for start, end in pairwise(bounds)]
    assert sum(sizes) == num_layers
    assert max(sizes) - min(sizes) <= 1 and sizes[-1] == min(sizes)


def test_kimi_linear_on_eight_ranks():
    layout = make_layout(27, 6, num_ranks=8, num_virtual_stages=3)
    assert layout.bounds[:5] == (0, 2, 4, 6, 7)
    assert list(layout.layers(2)) == [4, 5]
    assert list(layout.sublayers(2)) == [9, 10, 11, 12]


def test_explicit_layout():
    layout = make_layout(7, 3, num_ranks=2, num_virtual_stages=2, layout=[1, 3, 2, 1])
    assert layout.bounds == (0, 1, 4, 6, 7)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((4, 2, 2, 3), ["model.num_layers is 4", "virtual_pipeline_model_parallel_size 3"]),
        ((4, 2, 0, 1), ["parallel.pipeline_model_parallel_size 0"]),
        ((4, 2, 2, 1, [3]), ["parallel.layout lists 1 chunks"]),
        ((4, 2, 2, 1, [3, 2]), ["parallel.layout", "hold 5 layers", "model.num_layers is 4"]),
        ((4, 2, 2, 1, [4, 0]), ["parallel.layout", "at least one decoder layer"]),
        ((4, 2, 2, 1, "odd"), ["parallel.layout is 'odd'", "'even'"]),
        ((27, 6, 8, 4, "auto"), ["makes 32 chunks", "model.num_layers is 27"]),
    ],
)
def test_impossible_layouts_name_the_key(arguments, named):
    with pytest.raises(UserError) as error:
        make_layout(*arguments)
    assert all(words in str(error.value) for words in named)


def test_chunks_must_divide_over_the_ranks():
    with pytest.raises(UserError, match="3 chunks cannot be dealt out evenly"):
        Layout(Blocks(6, 2), (0, 1, 2, 3), num_ranks=2)


def chunk_costs(costs, bounds):
    return [sum(costs[start:end]) for start, end in pairwise(bounds)]


@given(st.lists(st.integers(0, 20), min_size=1, max_size=9), st.integers(1, 9))
def test_balanced_bounds_minimise_the_costliest_chunk(costs, num_ranks):
    num_ranks = min(num_ranks, len(costs))
    every_split = (
        (0, *cuts, len(costs)) for cuts in combinations(range(1, len(costs)), num_ranks - 1)
    )
    bounds = balanced_bounds(costs, num_ranks, 1)
    assert len(bounds) == num_ranks + 1 and all(a < b for a, b in pairwise(bounds))
    assert max(chunk_costs(costs, bounds)) == min(max(chunk_costs(costs, s)) for s in every_split)


@given(st.data())
def test_balanced_bounds_of_virtual_stages(data):
    """Chunks with a limit for the last virtual stage, and the lowest one for the others."""
    ranks, virtual = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 3))
    num_chunks = ranks * virtual
    costs = data.draw(
        st.lists(st.integers(1, 20), min_size=num_chunks, max_size=max(num_chunks, 9))
    )
    costs[-1] += data.draw(st.integers(0, 60))
    last_stage = slice(num_chunks - ranks, None)

    def limit(bounds):
        """The lowest that admits these bounds."""
        chunks = chunk_costs(costs, bounds)
        above = [cost for cost in chunks[last_stage] if cost > costs[-1]]
        return max(chunks[: last_stage.start] + above)

    every_split = (
        (0, *cuts, len(costs)) for cuts in combinations(range(1, len(costs)), num_chunks - 1)
    )
    bounds = balanced_bounds(costs, ranks, virtual)
    assert limit(bounds) <= max(min(map(limit, every_split)), max(costs[:-1]))


def test_equal_layers_are_spread_evenly():
    sizes = [end - start for start, end in pairwise(balanced_bounds([1.0] * 93, 16, 1))]
    assert sizes == [5] * 3 + [6] * 13
    sizes = [end - start for start, end in pairwise(balanced_bounds([1.0] * 24, 4, 2))]
    assert sizes == [3] * 8


def test_a_heavy_head_leaves_its_rank_few_layers():
    costs = [1.0] * 26 + [3.6]
    assert balanced_bounds(costs, 8, 1) == (0, 3, 6, 10, 14, 18, 22, 26, 27)
    layout = make_layout(27, 6, 8, 1, "auto", costs)
    assert layout.bounds == balanced_bounds(costs, 8, 1)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=30))
def test_one_rank_takes_all_layers_however_their_costs_add_up(costs):
    assert balanced_bounds(costs, 1, 1) == (0, len(costs))


def test_balanced_bounds_need_a_layer_per_chunk():
    with pytest.raises(ValueError, match="2 layers into 3 chunks"):
        balanced_bounds([1.0, 1.0], 3, 1)
