"""The order of samples: every epoch has each once, and nothing is lost where files come later."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from attnres_train.data.epochs import Order

SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def grown(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Sizes of generations, and the samples from which they count."""
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    steps = draw(st.lists(st.integers(0, 90), min_size=len(sizes) - 1, max_size=len(sizes) - 1))
    return sizes, [0, *(sum(steps[: number + 1]) for number in range(len(steps)))]


def epochs_of(sizes: list[int], starts: list[int], count: int) -> list[int]:
    """Where each of the first ``count`` epochs ends, counted here by hand."""
    ends, end, known = [], 0, 0
    for _ in range(count):
        begun, known = end, max(known, sum(start <= end for start in starts[1:]))
        end += sizes[0] + sum(sizes[1 : known + 1])
        while known + 1 < len(sizes) and starts[known + 1] < end:
            known += 1
            end += sizes[known]
        assert end > begun
        ends.append(end)
    return ends


@given(st.integers(1, 300), SEEDS, st.integers(0, 50))
def test_an_epoch_is_a_permutation(size, seed, epoch):
    order = Order(seed, [size])
    places = [order(epoch * size + place) for place in range(size)]
    assert sorted(places) == [(0, place) for place in range(size)]
    if epoch == 0:
        assert places == sorted(places)


@given(grown(), SEEDS)
def test_every_epoch_has_every_sample_once_whenever_files_come(generations, seed):
    sizes, starts = generations
    order, begin = Order(seed, sizes, starts), 0
    for end in epochs_of(sizes, starts, 12):
        seen = Counter(order(index) for index in range(begin, end))
        assert set(seen.values()) == {1}
        there = [g for g in range(len(sizes)) if g == 0 or starts[g] < end]
        assert set(seen) == {(g, place) for g in there for place in range(sizes[g])}
        begin = end


@given(grown(), SEEDS, st.integers(0, 200))
def test_what_comes_later_changes_nothing_before_it(generations, seed, start):
    """So that the position of a run means the same before and after, however often it grows."""
    sizes, starts = generations
    before = Order(seed, sizes, starts)
    after = Order(seed, [*sizes, 7], [*starts, starts[-1] + start])
    until = starts[-1] + start
    assert [before(index) for index in range(until)] == [after(index) for index in range(until)]
    assert Order(seed, [*sizes, 7], [*starts, until])(until + 3) == after(until + 3)


@given(SEEDS, st.integers(0, 900))
def test_the_new_is_mixed_with_the_rest_evenly(seed, start):
    order = Order(seed, [1000, 500], [0, start])
    left, stop = 1000 - start, 1500
    window = 60
    for begin in range(start, stop - window, window):
        new = sum(order(index)[0] for index in range(begin, begin + window))
        assert abs(new - window * 500 / (500 + left)) < 12


def test_the_order_depends_on_the_seed_and_takes_no_memory():
    sizes = [10**12, 10**11]
    one, two = (Order(seed, sizes, [0, 10**9]) for seed in (1, 2))
    assert [one(10**9 + n) for n in range(9)] != [two(10**9 + n) for n in range(9)]
    assert one(10**14) == Order(1, sizes, [0, 10**9])(10**14)
