from __future__ import annotations

from itertools import chain, combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnres_train.errors import UserError
from attnres_train.model.blocks import Blocks
from attnres_train.pipeline.layout import Layout, balanced_bounds, even_bounds, make_layout
from tests.pipeline.layouts import layouts


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
    ],
)
def test_impossible_layouts_name_the_key(arguments, named):
    with pytest.raises(UserError) as error:
        make_layout(*arguments)
    assert all(words in str(error.value) for words in named)


def test_chunks_must_divide_over_the_ranks():
    with pytest.raises(UserError, match="3 chunks cannot be dealt out evenly"):
        Layout(Blocks(6, 2), (0, 1, 2, 3), num_ranks=2)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=9), st.integers(1, 9))
def test_balanced_bounds_minimise_the_costliest_chunk(costs, num_chunks):
    num_chunks = min(num_chunks, len(costs))

    def costliest(bounds):
        return max(sum(costs[a:b]) for a, b in pairwise(bounds))

    every_split = (
        (0, *cuts, len(costs)) for cuts in combinations(range(1, len(costs)), num_chunks - 1)
    )
    bounds = balanced_bounds(costs, num_chunks)
    assert len(bounds) == num_chunks + 1 and all(a < b for a, b in pairwise(bounds))
    assert costliest(bounds) == min(map(costliest, every_split))


def test_balanced_bounds_need_a_layer_per_chunk():
    with pytest.raises(ValueError, match="2 layers into 3 chunks"):
        balanced_bounds([1.0, 1.0], 3)
