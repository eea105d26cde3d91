"""Curves and charts: thinned without losing what matters, and drawn where they belong."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

import pytest

from attnres_train.reports.chart import LEFT, Chart, number, ticks
from attnres_train.reports.curves import (
    POINTS,
    Axis,
    Curve,
    Point,
    loss_curves,
    thinned,
    time_axis,
    token_axis,
)
from attnres_train.reports.reading import read_runs
from tests.reports.folders import falling, make_run

TOKENS = Axis("tokens", "", 1.0)


def test_few_steps_are_all_there():
    points, each = thinned([1.0, 2.0, 3.0], [5.0, 4.0, 3.0], [5.0, 4.5, 4.0])
    assert each == 1 and points[1] == Point(2.0, 4.5, 4.0, 4.0)


def test_many_steps_keep_their_extremes():
    ys = [1.0] * 10_000
    ys[5_000], ys[7_000] = 99.0, -99.0
    points, each = thinned([float(n) for n in range(10_000)], ys)
    assert len(points) <= POINTS and each == 34
    assert max(p.high for p in points) == 99.0 and min(p.low for p in points) == -99.0
    assert points[-1].x == 9_999


def test_what_is_not_finite_interrupts_a_curve():
    points, _ = thinned([1.0, 2.0, 3.0, 4.0], [1.0, math.nan, 2.0, 3.0])
    assert math.isnan(points[1].y)
    root = ElementTree.fromstring(Chart("k", "n", "u", TOKENS, [Curve(0, points, 1)]).svg(["a"]))
    assert len(list(root.iter("polyline"))) == 2


def test_time_adds_up_and_is_told_in_a_unit_to_read(tmp_path):
    (run,) = runs = read_runs([make_run(tmp_path / "a", falling(100))])
    axis = time_axis(runs)
    assert (axis.unit, axis.label) == ("minutes", "time in steps")
    assert axis.values(run.records, False)[-1] == pytest.approx(200 / 60)
    assert token_axis(runs).unit == "thousands"
    (curve,) = loss_curves(runs, axis)
    assert len(curve.points) == 100 and len(curve.marks) == 10


def test_values_lie_where_the_axes_say():
    points = [Point(0.0, 1.0, 1.0, 1.0), Point(10.0, 3.0, 3.0, 3.0)]
    chart = Chart("k", "n", "u", TOKENS, [Curve(0, points, 1)])
    assert chart.x(0.0) == LEFT and chart.x(5.0) == (chart.x(0.0) + chart.x(10.0)) / 2
    assert chart.y(3.0) < chart.y(2.0) < chart.y(1.0)
    low, high = chart.y_range
    assert low < 1.0 and high > 3.0


def test_a_spike_of_single_steps_does_not_press_the_curve_flat():
    points = [Point(float(n), 2.0 + n / 100, 1.9, 1e6 if n == 50 else 2.1) for n in range(100)]
    assert Chart("k", "n", "u", TOKENS, [Curve(0, points, 1)]).y_range[1] < 4


@pytest.mark.parametrize("points", [[], [Point(1.0, 2.0, 2.0, 2.0)], [Point(1.0, *[math.nan] * 3)]])
def test_nothing_and_single_values_can_be_drawn(points):
    curves = [Curve(0, points, 1)] if points else []
    ElementTree.fromstring(Chart("k", "n", "u", TOKENS, curves).svg(["a"]))


@pytest.mark.parametrize(("low", "high"), [(0, 1), (3.2, 8.9), (1e-5, 4e-3), (0, 81_920_000)])
def test_ticks_are_round_and_few(low, high):
    found = ticks(low, high, 5)
    assert 2 <= len(found) <= 6 and low <= found[0] + 1e-9 and found[-1] <= high * (1 + 1e-9)


@pytest.mark.parametrize(
    ("value", "text"),
    [(4.6489, "4.649"), (0.002, "0.002"), (12345.6, "12,346"), (0, "0"), (1.2e-5, "1.2e-05")],
)
def test_numbers(value, text):
    assert number(value) == text
