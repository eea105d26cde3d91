"""Which times of a step its picture shows."""

from __future__ import annotations

import pytest

from attnres_train.errors import UserError
from attnres_train.pipeline.plan.schedule import Action
from attnres_train.pipeline.plan.simulate import Pass, Timeline
from attnres_train.planning.window import PASSES, Scale, asked, telling


@pytest.mark.parametrize(
    ("text", "stretch"),
    [
        ("0:40ms", (0.0, 0.04)),
        ("500:1500ms", (0.5, 1.5)),
        ("1.5s:2s", (1.5, 2.0)),
        ("45%:55%", (0.9, 1.1)),
        ("90%:", (1.8, 2.0)),
        (":1s", (0.0, 1.0)),
        ("100us:9s", (1e-4, 2.0)),
    ],
)
def test_a_window_in_words(text, stretch):
    (found,) = asked(text, 2.0)
    assert found == pytest.approx(stretch)


@pytest.mark.parametrize("text", ["", ":", "5", "a:b", "1:2", "2s:1s", "3s:4s", "1s:1s", "1s:2m"])
def test_no_window(text):
    with pytest.raises(UserError, match="--window"):
        asked(text, 2.0)


def alternating(number: int, warm: int) -> Timeline:
    """One rank: ``warm`` forward passes, then backward and forward in turns, a second each."""
    order = "F" * warm + "BF" * (number - warm) + "B" * warm
    passes = [
        Pass(0, Action(kind, 0, 0), float(n), n + 1.0, n + 1.0) for n, kind in enumerate(order)
    ]
    return Timeline([float(len(order))], float(len(order)), passes)


def test_a_short_step_is_shown_whole():
    assert telling(alternating(50, 4)) == [(0.0, 100.0)]


def test_a_long_step_is_shown_at_both_ends_and_in_the_middle():
    begin, middle, end = telling(alternating(500, 10))
    assert begin[0] == 0 and 10 < begin[1] < 20
    assert end[1] == 1000 and 980 < end[0] < 990
    assert begin[1] < middle[0] < 500 < middle[1] < end[0]
    assert sum(last - first for first, last in (begin, middle, end)) == pytest.approx(PASSES)


def test_a_long_warm_up_leaves_room_for_the_rest():
    begin, middle, end = telling(alternating(5000, 4000))
    for first, last in (begin, middle, end):
        assert last - first >= 0.19 * PASSES


def test_what_is_left_out_is_not_drawn():
    scale = Scale.fitting([(0.0, 1.0), (8.0, 10.0)], left=10, width=310, gap=10)
    assert scale.pixels == 100
    assert list(scale.spans(0.0, 10.0)) == [(10.0, 100.0), (120.0, 200.0)]
    assert list(scale.spans(0.5, 5.0)) == [(60.0, 50.0)]
    assert not list(scale.spans(2.0, 7.0))
