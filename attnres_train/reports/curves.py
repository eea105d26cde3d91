"""Curves of runs as they are drawn: thinned, so that a page does not grow with the steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple, TypeVar

from attnres_train.observe.observer import Record
from attnres_train.reports.reading import Run

T = TypeVar("T")
POINTS = 300
"""Of a curve, at most. Each stands for as many steps as the others."""
_MARKS = 200
_MINUTE, _HOUR, _DAY = 60.0, 3600.0, 86400.0


class Point(NamedTuple):
    """What becomes of the steps that one point stands for; NaN where none of them is finite."""

    x: float
    """At the last of them."""
    y: float
    """The smoothed value at the last of them, or their mean."""
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """Of one run in one chart."""

    run: int
    """Its number among the runs of the report."""
    points: Sequence[Point]
    steps_per_point: int
    marks: Sequence[tuple[float, float]] = field(default=())
    """Single values, e.g. validation losses."""
    strands: Sequence[Sequence[tuple[float, float]]] = field(default=())
    """What the curve is the mean of, as thin lines."""


@dataclass(frozen=True)
class Axis:
    """What x is: a column of numbers over the records of a run, in ``unit``."""

    label: str
    unit: str
    divisor: float
    is_time: bool = False
    is_log: bool = False
    """Whether x of points is the decimal logarithm of what is told."""

    def values(self, records: Sequence[Record], wall: bool) -> list[float]:
        """By record. ``wall``: time since the run's first step rather than spent in steps."""
        if not self.is_time:
            return [record.get("tokens", math.nan) / self.divisor for record in records]
        if wall:
            return [record.get("wall_seconds", math.nan) / self.divisor for record in records]
        times = (_or_zero(record.get("step_seconds", 0.0)) for record in records)
        return [seconds / self.divisor for seconds in accumulate(times)]


def _or_zero(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def token_axis(runs: Sequence[Run]) -> Axis:
    return token_axis_to(
        max((r.get("tokens", 0) for run in runs for r in run.records[-1:]), default=0)
    )


def token_axis_to(most: float) -> Axis:
    """Of tokens up to ``most``."""
    for divisor, unit in ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands")):
        if most >= divisor:
            return Axis("tokens", unit, divisor)
    return Axis("tokens", "", 1.0)


def time_axis(runs: Sequence[Run]) -> Axis:
    probe = Axis("", "", 1.0, is_time=True)
    wall = has_wall_time(runs)
    ends = [times[-1] for run in runs if (times := probe.values(run.records, wall))]
    label = "time since the first step" if wall else "time in steps"
    most = max((end for end in ends if math.isfinite(end)), default=0.0)
    for divisor, unit in ((_DAY, "days"), (_HOUR, "hours"), (_MINUTE, "minutes")):
        if most >= 2 * divisor:
            return Axis(label, unit, divisor, is_time=True)
    return Axis(label, "seconds", 1.0, is_time=True)


def has_wall_time(runs: Sequence[Run]) -> bool:
    """Whether all of ``runs`` that have records tell it, so that they can be compared by it."""
    return all("wall_seconds" in run.records[-1] for run in runs if run.records)


def loss_curves(runs: Sequence[Run], axis: Axis) -> list[Curve]:
    """Smoothed training loss, its envelope, and validation losses as marks."""
    wall, curves = has_wall_time(runs), []
    for number, run in enumerate(runs):
        if run.records:
            xs = axis.values(run.records, wall)
            pairs = zip(xs, _column(run, "validation_loss"), strict=True)
            marks = [pair for pair in pairs if all(map(math.isfinite, pair))]
            points, each = thinned(xs, _column(run, "loss"), _column(run, "smoothed_loss"))
            curves.append(Curve(number, points, each, marks[:: -(-len(marks) // _MARKS) or 1]))
    return curves


def curves_of(runs: Sequence[Run], key: str, axis: Axis) -> list[Curve]:
    """Those of any other key of the records, of the runs that have it."""
    curves = []
    for number, run in enumerate(runs):
        records = [record for record in run.records if math.isfinite(record.get(key, math.nan))]
        if records:
            xs = axis.values(records, False)
            points, each = thinned(xs, [record[key] for record in records])
            curves.append(Curve(number, points, each))
    return curves


def _column(run: Run, key: str) -> list[float]:
    return [record.get(key, math.nan) for record in run.records]


def few(points: Sequence[T]) -> Sequence[T]:
    """At most `POINTS` of ``points`` at even distances, the last one always."""
    return points[::-1][:: -(-len(points) // POINTS) or 1][::-1]


def thinned(
    xs: Sequence[float], ys: Sequence[float], smooth: Sequence[float] | None = None
) -> tuple[list[Point], int]:
    """At most `POINTS` points of a curve, and how many steps each stands for (the last may have
    fewer): with the least and the greatest of them, so that no spike is lost."""
    each = max(1, -(-len(xs) // POINTS))
    points = []
    for begin in range(0, len(xs), each):
        finite = [y for y in ys[begin : begin + each] if math.isfinite(y)]
        end = min(begin + each, len(xs)) - 1
        if not finite:
            points.append(Point(xs[end], math.nan, math.nan, math.nan))
            continue
        y = smooth[end] if smooth is not None else sum(finite) / len(finite)
        points.append(Point(xs[end], y, min(finite), max(finite)))
    return points, each
