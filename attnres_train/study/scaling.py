"""Power laws of loss over compute through the sizes of a study, from its `Analysis`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

from attnres_train.study.analysis import Analysis, Group
from attnres_train.study.power_law import (
    PFLOPS_DAY,
    Fit,
    compute_multiplier,
    fit_with_uncertainty,
    multiplier_interval,
)
from attnres_train.study.statistics import Interval


@dataclass(frozen=True)
class Scaling:
    """The laws of the kinds, each at its best, through the sizes of one choice of other labels."""

    labels: Mapping[str, str]
    points: Mapping[str, list[tuple[float, float]]]
    """By kind: compute in PFLOP/s-days, loss."""
    fits: Mapping[str, Fit]
    multipliers: Mapping[str, tuple[float, Interval]]
    """By kind: how many times its compute the baseline needs, at the largest compute that all
    have, and the interval."""
    problem: str = ""
    """Why there is no fit."""


def scalings(analysis: Analysis) -> list[Scaling]:
    axis = analysis.report["fit"]
    if axis is None:
        return []

    def rest(group: Group) -> tuple[tuple[str, str], ...]:
        return tuple((name, label) for name, label in group.labels.items() if name != axis)

    groups = sorted(analysis.groups, key=rest)
    return [_scaling(analysis, dict(key), list(some)) for key, some in groupby(groups, rest)]


def _scaling(analysis: Analysis, labels: Mapping[str, str], groups: list[Group]) -> Scaling:
    points = {kind: list(_points(analysis, groups, kind)) for kind in analysis.kinds}
    report = analysis.report
    floor, confidence = report["fit_floor"], report["confidence"]
    try:
        fits = {
            kind: fit_with_uncertainty(*zip(*some, strict=True), floor=floor, confidence=confidence)
            for kind, some in points.items()
            if some
        }
    except ValueError as error:
        return Scaling(labels, points, {}, {}, str(error))
    multipliers = {}
    baseline = analysis.baseline
    for kind in fits:
        if kind == baseline or baseline not in fits or len(points[kind]) != len(points[baseline]):
            continue
        # Kinds differ in compute by a percent or so: the baseline's is the axis.
        compute, first = zip(*points[baseline], strict=True)
        second = [loss for _, loss in points[kind]]
        at = max(compute)
        multipliers[kind] = (
            compute_multiplier(fits[baseline].law, fits[kind].law, at),
            multiplier_interval(compute, first, second, at, floor=floor, confidence=confidence),
        )
    return Scaling(labels, points, fits, multipliers)


def _points(analysis: Analysis, groups: list[Group], kind: str) -> Iterator[tuple[float, float]]:
    for group in groups:
        if (cell := group.best.get(kind)) is None:
            continue
        run = analysis.run(group.labels, kind, cell.tuned, next(iter(cell.values)))
        assert run is not None  # it has given the value
        yield run["model_flops_per_token"] * run["tokens"] / PFLOPS_DAY, cell.mean
