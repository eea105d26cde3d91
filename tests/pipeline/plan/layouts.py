"""Layouts for property tests: any split, any block size, cuts inside layers included."""

from __future__ import annotations

from itertools import accumulate

from hypothesis import strategies as st

from attnres_train.model.blocks import Blocks
from attnres_train.pipeline.plan.layout import Layout


@st.composite
def layouts(draw: st.DrawFn, max_ranks: int = 5, max_virtual_stages: int = 4) -> Layout:
    num_ranks = draw(st.integers(1, max_ranks))
    num_chunks = num_ranks * draw(st.integers(1, max_virtual_stages))
    sizes = draw(st.lists(st.integers(1, 5), min_size=num_chunks, max_size=num_chunks))
    per_layer = draw(st.sampled_from([1, 2]))
    num_sublayers = sum(sizes) * per_layer
    block_size = draw(st.none() | st.integers(1, num_sublayers + 2))
    bounds = (0, *accumulate(sizes))
    return Layout(Blocks(num_sublayers, block_size), bounds, num_ranks, per_layer)
