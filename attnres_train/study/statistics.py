"""What can be said of runs that come in pairs: the mean of their differences and how sure it is.

Runs of one seed see the same samples in the same order and begin with the same weights, so that
what a seed brings to both leaves their difference. Shapes: n pairs, B resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev
from typing import NamedTuple

import numpy as np

from attnres_train.study import student

RESAMPLES = 9999


class Interval(NamedTuple):
    low: float
    high: float

    def __contains__(self, value: object) -> bool:
        return isinstance(value, (int, float)) and self.low <= value <= self.high


@dataclass(frozen=True)
class Difference:
    """Of paired runs, the one minus the other. What one pair alone cannot say is None."""

    each: tuple[float, ...]
    mean: float
    deviation: float | None
    """Standard deviation of `each`, with n - 1."""
    t: float | None
    """The mean over its standard error."""
    p: float | None
    """Two-sided, of Student's t with n - 1 degrees of freedom."""
    student: Interval | None
    bootstrap: Interval | None
    """Of few pairs it is too narrow (tests/study/test_statistics.py): believe `student` then."""


def paired(
    values: Sequence[float], baseline: Sequence[float], confidence: float = 0.95, seed: int = 0
) -> Difference:
    """The difference of ``values`` from ``baseline``, pair by pair. Raises ValueError where there
    is no pair, or one without its other half."""
    if len(values) != len(baseline) or not values:
        raise ValueError(f"{len(values)} values make no pairs with {len(baseline)}")
    each = tuple(value - other for value, other in zip(values, baseline, strict=True))
    mean = fmean(each)
    if len(each) == 1:
        return Difference(each, mean, None, None, None, None, None)
    deviation = stdev(each)
    error = deviation / math.sqrt(len(each))
    t = mean / error if error else math.copysign(math.inf, mean) if mean else 0.0
    return Difference(
        each,
        mean,
        deviation,
        t,
        student.two_sided(t, len(each) - 1),
        student_interval(each, confidence),
        bootstrap_interval(each, confidence, seed),
    )


def student_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Of the mean of two or more ``values``, exact where those are normal."""
    reach = student.quantile((1 + confidence) / 2, len(values) - 1)
    reach *= stdev(values) / math.sqrt(len(values))
    return Interval(fmean(values) - reach, fmean(values) + reach)


def bootstrap_interval(
    values: Sequence[float], confidence: float = 0.95, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """Of the mean of two or more ``values``: bias-corrected and accelerated (BCa; Efron 1987),
    which assumes no distribution. The same for the same ``seed``."""
    data = np.asarray(values, dtype=float)
    count, mean = len(data), float(data.mean())
    if not np.ptp(data):
        return Interval(mean, mean)
    picked = np.random.default_rng(seed).integers(count, size=(resamples, count))
    means = np.sort(data[picked].mean(axis=1))  # [B]
    normal = NormalDist()
    below = (np.sum(means < mean) + 0.5 * np.sum(means == mean)) / resamples
    bias = normal.inv_cdf(min(max(float(below), 0.5 / resamples), 1 - 0.5 / resamples))
    left_out = (data.sum() - data) / (count - 1)
    bent = left_out.mean() - left_out
    acceleration = float((bent**3).sum() / (6 * (bent**2).sum() ** 1.5))

    def end(probability: float) -> float:
        z = bias + normal.inv_cdf(probability)
        share = normal.cdf(bias + z / (1 - acceleration * z))
        return float(np.quantile(means, share))

    return Interval(end((1 - confidence) / 2), end((1 + confidence) / 2))
