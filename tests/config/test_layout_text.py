from __future__ import annotations

from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnres_train.config import ConfigError
from attnres_train.config.layout_text import parse_layout, stated_layers
from attnres_train.megatron import megatron_core


@st.composite
def spelled(draw: st.DrawFn) -> tuple[list[int], str]:
    """Layers per chunk, and one of the many strings for them that Megatron understands."""
    runs = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), min_size=1, max_size=6))
    sizes = [size for size, times in runs for _ in range(times)]
    text = "E"
    for size, run in groupby(sizes[:-1]):
        times = len(list(run))
        layers = draw(st.sampled_from(["t" * size, f"t*{size}"]))
        comma = draw(st.sampled_from(["", ","]))
        text += draw(st.sampled_from([f"{layers}|{comma}" * times, f"({layers}|)*{times}{comma}"]))
    return sizes, f"{text}t*{sizes[-1]}L"


@given(spelled())
def test_every_spelling_gives_the_sizes(case):
    sizes, text = case
    assert parse_layout(text) == stated_layers(text) == sizes


@settings(max_examples=50)
@given(spelled())
def test_megatron_reads_it_alike(case):
    """Chunk ``c`` is Megatron's virtual stage ``c // P`` of rank ``c % P``."""
    theirs = megatron_core("transformer.pipeline_parallel_layer_layout")
    decoder = megatron_core("transformer.enums").LayerType.decoder
    sizes, text = case
    ranks = max(p for p in (1, 2, 3, 4) if len(sizes) % p == 0)
    layout = theirs.PipelineParallelLayerLayout(text, ranks).layout
    chunks = [layout[c % ranks][c // ranks] for c in range(len(sizes))]
    assert [chunk.count(decoder) for chunk in chunks] == parse_layout(text)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("Et*3|(tt|)*2ttL", [3, 2, 2, 2]),
        ("E (t, t|)*2 t*2 L", [2, 2, 2]),
        ("E((t|)*2tt|)*2tL", [1, 1, 2, 1, 1, 2, 1]),
        ("E(tt|tt)L", [2, 2]),
        ("Et*0ttL", [2]),
    ],
)
def test_examples(text, sizes):
    assert parse_layout(text) == sizes


@pytest.mark.parametrize("layout", ["even", "auto"])
def test_what_is_not_stated(layout):
    assert stated_layers(layout) is None


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("evne", "cannot read 'e' at character 1; write even, auto, a list"),
        ("Et|x|tL", "cannot read 'x' at character 4"),
        ("Et*|tL", "cannot read '*' at character 3"),
        ("Et*2*2L", "cannot read '*' at character 5"),
        ("Et)*2L", "cannot read ')' at character 3"),
        ("E(*2t)L", "cannot read '(' at character 2"),
        ("E(t|tL", "a parenthesis is not closed"),
        ("Et|mL", "multi-token prediction (m) is not there yet"),
        ("tt|tL", "must begin with the embedding E and end with the loss L, once each"),
        ("Et|tLL", "must begin with the embedding E and end with the loss L, once each"),
        ("Et|EtL", "must begin with the embedding E and end with the loss L, once each"),
        ("", "must begin with the embedding E"),
        ("E|tt|tL", "chunk 1 of 3 holds only E, but every chunk needs at least one decoder"),
        ("Et|tt|L", "chunk 3 of 3 holds only L, but every chunk needs at least one decoder"),
        ("Et|*2tL", "chunk 2 of 3 holds nothing, but every chunk needs at least one decoder"),
        ("Et*999999999L", "a count of 999999999 makes more than 100,000 items"),
    ],
)
def test_what_is_wrong_is_said_beside_the_string(text, what):
    with pytest.raises(ConfigError) as error:
        parse_layout(text)
    assert str(error.value).startswith(f"parallel.layout '{text}': ")
    assert what in str(error.value)
