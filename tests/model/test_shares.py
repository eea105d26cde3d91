"""Shares of samples against plain loops over positions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnres_train.model.shares import Shares, Span, cumulative


@st.composite
def layouts(draw):
    """Shares, number of samples, tokens of a share, borders of documents."""
    count = draw(st.integers(1, 6))
    own = sorted(draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=2)))
    samples, size = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    inner = draw(st.lists(st.integers(0, samples * count * size), max_size=6))
    borders = [0, *sorted(inner), samples * count * size]
    return Shares(count, tuple(own)), samples, size, borders


def positions(shares: Shares, samples: int, size: int) -> list[list[int]]:
    """Of every row, the flat positions of its tokens in whole samples."""
    whole = shares.count * size
    return [
        [sample * whole + share * size + i for i in range(size)]
        for sample in range(samples)
        for share in shares.own
    ]


@given(layouts())
def test_rows_are_the_own_shares(layout):
    shares, samples, size, _ = layout
    whole = torch.arange(samples * shares.count * size).view(samples, -1)
    rows = shares.rows(shares.of(whole))
    assert rows.tolist() == positions(shares, samples, size)
    assert torch.equal(shares.joined(rows), shares.of(whole))


@given(layouts(), st.integers(0, 3))
def test_starts(layout, before):
    shares, samples, size, borders = layout
    whole = shares.count * size
    expected = []
    for row in positions(shares, samples, size):
        in_front = [row[0] - i if row[0] % whole >= i else -1 for i in range(before, 0, -1)]
        expected.append([p >= 0 and (p in borders or p % whole == 0) for p in [*in_front, *row]])
    rows = torch.Size([len(expected), size])
    starts = shares.starts(torch.tensor(borders), rows, before)
    assert starts.tolist() == expected
    length = before + size
    wanted = {i * length + j for i, row in enumerate(expected) for j in range(length) if row[j]}
    wanted |= set(range(0, len(expected) * length + 1, length))
    assert cumulative(starts).tolist() == sorted(wanted)


@given(layouts())
def test_spans(layout):
    shares, samples, size, borders = layout
    whole = shares.count * size
    expected: list[Span] = []
    for row in positions(shares, samples, size):
        for i, position in enumerate(row):
            sample, offset = divmod(position, whole)
            start = max(b for b in [*borders, sample * whole] if b <= position) - sample * whole
            if i == 0 or start == offset:
                expected.append(Span(sample, 0, start, offset))
            last = expected[-1]
            expected[-1] = last._replace(tokens=last.tokens + 1, end=offset + 1)
    spans = list(shares.spans(torch.tensor(borders), samples, size * len(shares.own)))
    assert spans == expected


def test_all_is_here_by_default():
    x = torch.randn(2, 6, 3)
    whole = Shares()
    assert whole.of(x) is x
    assert whole.rows(x).data_ptr() == x.data_ptr()
    assert torch.equal(whole.rows(x), x)


@pytest.mark.parametrize("own", [(0, 3), (1, 2)])
def test_gradients_reach_what_is_here(own):
    x = torch.ones(1, 8, 1, requires_grad=True)
    Shares(4, own).of(x).sum().backward()
    assert x.grad.flatten().tolist() == [float(i // 2 in own) for i in range(8)]
