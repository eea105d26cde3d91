"""Places of parts of tensors, and the names that tell them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnres_train.model import parts
from attnres_train.model.parts import Place, Span


@st.composite
def places(draw, shape: list[int]) -> Place:
    ends = [sorted((draw(st.integers(0, size)), draw(st.integers(0, size)))) for size in shape]
    return tuple(Span(*end, size) for end, size in zip(ends, shape, strict=True))


SHAPES = st.lists(st.integers(1, 7), min_size=0, max_size=3)
PAIRS = SHAPES.flatmap(lambda shape: st.tuples(places(shape), places(shape)))


@given(PAIRS)
def test_a_name_tells_the_place(pair):
    place, _ = pair
    text = parts.named("a.weight", place)
    assert parts.parsed(text, parts.part_shape(place)) == ("a.weight", place)
    assert parts.tensor_of(text) == "a.weight"
    assert parts.is_part(text) == (not parts.is_whole(place))


@given(PAIRS)
def test_what_two_parts_have_in_common_is_found_in_both(pair):
    first, second = pair
    tensor = torch.arange(1.0, 1 + torch.Size(parts.whole_shape(first)).numel())
    tensor = tensor.view(parts.whole_shape(first))
    all_of_it = parts.whole(tensor.shape)
    a, b = (tensor[parts.indices(place, all_of_it)] for place in pair)
    assert list(a.shape) == parts.part_shape(first)
    expected = set(a.flatten().tolist()) & set(b.flatten().tolist())
    both = parts.common(first, second)
    if both is None:
        assert not expected
    else:
        in_a, in_b = a[parts.indices(both, first)], b[parts.indices(both, second)]
        assert torch.equal(in_a, in_b) and set(in_a.flatten().tolist()) == expected


def test_names_are_read_like_indices():
    table = parts.whole([163840, 4])
    assert parts.named("t", parts.narrowed(table, 0, 4096, 8192)) == "t[4096:8192 of 163840]"
    assert parts.named("t", parts.one_of([8, 2], 1, 1, 2)) == "t[:, 2:4 of 4]"
    both = parts.within(parts.one_of([8, 2], 1, 1, 2), parts.narrowed(parts.whole([8, 2]), 0, 1, 3))
    assert parts.named("t", both) == "t[1:3 of 8, 2:4 of 4]"


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("t[0:4 of 8]", [3]),
        ("t[0:4 of 8]", []),
        ("t[4:2 of 8]", [-2]),
        ("t[6:10 of 8]", [4]),
        ("t[:, 0:4 of 8]", [4]),
    ],
)
def test_a_name_that_does_not_fit_is_an_error(text, shape):
    with pytest.raises(ValueError, match="not a part of shape"):
        parts.parsed(text, shape)
