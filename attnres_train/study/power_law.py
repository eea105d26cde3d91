"""Loss as a power of compute, L = E + A C^-alpha, how sure the fit is, and what one kind of model
saves against another (arXiv 2603.15031, section 5.1 and Fig. 4, fits without E).

Shapes: n points (sizes of a model), B resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from attnres_train.study import student
from attnres_train.study.statistics import Interval

Values = Sequence[float] | np.ndarray
RESAMPLES = 499
PFLOPS_DAY = 8.64e19
"""FLOPs of a PFLOP/s-day."""
_STEEPEST = 2.0
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class PowerLaw:
    scale: float
    """A, the loss above the floor at a compute of 1."""
    exponent: float
    """alpha, above 0 where more compute helps."""
    floor: float = 0.0
    """E, what no compute takes away."""

    def loss(self, compute: float) -> float:
        return self.floor + self.scale * compute**-self.exponent

    def compute(self, loss: float) -> float:
        """What reaches ``loss``: infinite at the floor, and of a law that does not fall."""
        if loss <= self.floor or self.scale <= 0 or self.exponent <= 0:
            return math.inf
        return float((self.scale / (loss - self.floor)) ** (1 / self.exponent))


@dataclass(frozen=True)
class Fit:
    law: PowerLaw
    scale: Interval
    exponent: Interval
    floor: Interval | None
    """None for a fit without one."""


def fit(compute: Values, loss: Values, *, floor: bool = False) -> PowerLaw:
    """The law through n points. Without a floor by least squares of log L over log C, with one of
    L, and then E is at least 0. Raises ValueError where points are too few: 2, or 3 with a floor,
    of different compute."""
    c, losses = _points(compute, loss, 3 if floor else 2)
    if not floor:
        x, y = np.log(c), np.log(losses)
        slope = float((x - x.mean()) @ y / ((x - x.mean()) @ x))
        return PowerLaw(math.exp(float(y.mean()) - slope * float(x.mean())), -slope)
    exponents = np.geomspace(1e-3, _STEEPEST, 25)
    errors = [_with_floor(c, losses, alpha)[1] for alpha in exponents]
    best = int(np.argmin(errors))
    low, high = exponents[max(best - 1, 0)], exponents[min(best + 1, len(exponents) - 1)]
    alpha = _minimum(lambda one: _with_floor(c, losses, one)[1], float(low), float(high))
    return _with_floor(c, losses, alpha)[0]


def fit_with_uncertainty(
    compute: Sequence[float],
    loss: Sequence[float],
    *,
    floor: bool = False,
    confidence: float = 0.95,
    seed: int = 0,
) -> Fit:
    """`fit`, and intervals: without a floor Student's of the regression, with one from resampled
    residuals, too narrow where points are few. Raises ValueError where no point is left over."""
    c, losses = _points(compute, loss, 4 if floor else 3)
    law = fit(c, losses, floor=floor)
    if floor:
        laws = _resampled(c, losses, floor, seed)
        columns = np.array([(one.scale, one.exponent, one.floor) for one in laws])
        ends = [_between(column, confidence) for column in columns.T]
        return Fit(law, ends[0], ends[1], ends[2])
    x = np.log(c)
    residuals = np.log(losses) - np.log([law.loss(one) for one in c])
    degrees = len(c) - 2
    variance = float((residuals**2).sum()) / degrees
    spread = float(((x - x.mean()) ** 2).sum())
    reach = student.quantile((1 + confidence) / 2, degrees)
    slope = reach * math.sqrt(variance / spread)
    level = reach * math.sqrt(variance * (1 / len(c) + float(x.mean()) ** 2 / spread))
    scale = Interval(law.scale * math.exp(-level), law.scale * math.exp(level))
    return Fit(law, scale, Interval(law.exponent - slope, law.exponent + slope), None)


def compute_multiplier(baseline: PowerLaw, law: PowerLaw, compute: float) -> float:
    """How many times the ``compute`` of ``law`` the ``baseline`` needs for the same loss."""
    return baseline.compute(law.loss(compute)) / compute


def multiplier_interval(
    compute: Sequence[float],
    baseline: Sequence[float],
    loss: Sequence[float],
    at: float,
    *,
    floor: bool = False,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Of `compute_multiplier` at compute ``at``: residuals of both fits are resampled together,
    point by point, for the two losses of a size share its noise. Raises ValueError as
    `fit_with_uncertainty`."""
    c, first = _points(compute, baseline, 4 if floor else 3)
    second = _points(compute, loss, 4 if floor else 3)[1]
    pairs = zip(
        _resampled(c, first, floor, seed),
        _resampled(c, second, floor, seed),
        strict=True,
    )
    return _between([compute_multiplier(one, other, at) for one, other in pairs], confidence)


def _points(compute: Values, loss: Values, least: int) -> tuple[np.ndarray, np.ndarray]:
    c, losses = np.asarray(compute, dtype=float), np.asarray(loss, dtype=float)
    if len(c) != len(losses) or len(set(c.tolist())) < least:
        raise ValueError(f"a power law needs {least} points of different compute or more")
    return c, losses


def _with_floor(c: np.ndarray, losses: np.ndarray, alpha: float) -> tuple[PowerLaw, float]:
    """The best law of exponent ``alpha``, in which L is linear, and its sum of squared errors."""
    power = c**-alpha
    centred = power - power.mean()
    scale = float((centred * losses).sum() / (centred**2).sum())
    level = float(losses.mean() - scale * power.mean())
    if level < 0:
        scale, level = float((power * losses).sum() / (power**2).sum()), 0.0
    return PowerLaw(scale, alpha, level), float(((level + scale * power - losses) ** 2).sum())


def _minimum(function: Callable[[float], float], low: float, high: float) -> float:
    """Of a ``function`` with one minimum between: golden section."""
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = function(left), function(right)
    while high - low > 1e-6:
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - _GOLDEN * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + _GOLDEN * (high - low)
            at_right = function(right)
    return (low + high) / 2


def _resampled(c: np.ndarray, losses: np.ndarray, floor: bool, seed: int) -> list[PowerLaw]:
    """Fits of the points with the residuals of their own fit, drawn anew; those are too small by
    what the fit has taken, and made larger by it. The same draws for the same ``seed``."""
    law = fit(c, losses, floor=floor)
    fitted = np.array([law.loss(one) for one in c])
    parameters = 3 if floor else 2
    residuals = np.log(losses / fitted) * math.sqrt(len(c) / (len(c) - parameters))
    rng = np.random.default_rng(seed)
    picked = rng.integers(len(c), size=(RESAMPLES, len(c)))
    return [fit(c, fitted * np.exp(residuals[one]), floor=floor) for one in picked]


def _between(values: Sequence[float] | np.ndarray, confidence: float) -> Interval:
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))
