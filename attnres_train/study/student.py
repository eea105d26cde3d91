"""Student's t distribution: its distribution function and quantiles, to about 1e-10."""

from __future__ import annotations

import math
from functools import cache

_TINY = 1e-300
_MOST_TERMS = 10_000


def cdf(t: float, degrees: float) -> float:
    """P(T <= ``t``) with ``degrees`` of freedom, above 0."""
    if math.isinf(t):
        return float(t > 0)
    tail = 0.5 * incomplete_beta(degrees / 2, 0.5, degrees / (degrees + t * t))
    return 1 - tail if t > 0 else tail


def two_sided(t: float, degrees: float) -> float:
    """P(|T| >= |``t``|): the p-value of a two-sided test."""
    return 0.0 if math.isinf(t) else incomplete_beta(degrees / 2, 0.5, degrees / (degrees + t * t))


@cache
def quantile(probability: float, degrees: float) -> float:
    """The t with P(T <= t) = ``probability``, between 0 and 1."""
    if not 0 < probability < 1:
        raise ValueError(f"a probability between 0 and 1, not {probability}")
    if probability < 0.5:
        return -quantile(1 - probability, degrees)
    low, high = 0.0, 1.0
    while cdf(high, degrees) < probability:
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if cdf(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b), 0 <= x <= 1: its continued fraction
    (Abramowitz and Stegun, 26.5.8), on the side where that converges fast."""
    if x in (0, 1):
        return float(x)
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(b, a, 1 - x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    log_front += a * math.log(x) + b * math.log1p(-x)
    return math.exp(log_front) / (a * _fraction(a, b, x))


def _fraction(a: float, b: float, x: float) -> float:
    """1 + d1/(1 + d2/(1 + ...)), by Lentz's method."""
    value, above, below = 1.0, 1.0, 0.0
    for number in range(1, _MOST_TERMS):
        m = number // 2
        if number % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        below = 1 / (1 + term * below or _TINY)
        above = 1 + term / above or _TINY
        value *= above * below
        if abs(above * below - 1) < 1e-15:
            break
    return value
