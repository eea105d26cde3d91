"""Intervals and tests of paired runs: against tables, and on synthetic runs whose difference is
known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnres_train.study import student
from attnres_train.study.statistics import bootstrap_interval, paired, student_interval

# Any statistics book: two-sided 90, 95 and 99 % points.
TABLE = {
    1: (6.3138, 12.7062, 63.6567),
    2: (2.9200, 4.3027, 9.9248),
    3: (2.3534, 3.1824, 5.8409),
    5: (2.0150, 2.5706, 4.0321),
    10: (1.8125, 2.2281, 3.1693),
    30: (1.6973, 2.0423, 2.7500),
    120: (1.6577, 1.9799, 2.6174),
}


@pytest.mark.parametrize("degrees", TABLE)
def test_quantiles_are_those_of_the_tables(degrees):
    found = [student.quantile(p, degrees) for p in (0.95, 0.975, 0.995)]
    assert found == pytest.approx(TABLE[degrees], abs=6e-5)


@given(st.floats(-50, 50), st.integers(1, 200))
def test_cdf_and_quantile_are_inverse_and_even(t, degrees):
    share = student.cdf(t, degrees)
    assert student.cdf(-t, degrees) == pytest.approx(1 - share, abs=1e-12)
    if 1e-6 < share < 1 - 1e-6:
        assert student.quantile(share, degrees) == pytest.approx(t, rel=1e-6, abs=1e-7)


def test_closed_forms():
    assert student.cdf(1.0, 1) == pytest.approx(0.75)  # Cauchy
    t = 1.7
    assert student.cdf(t, 2) == pytest.approx(0.5 + t / (2 * math.sqrt(2 + t * t)))
    assert student.incomplete_beta(3, 1, 0.4) == pytest.approx(0.4**3)


def test_one_difference_by_hand():
    """Validation losses of three seeds, standard and block."""
    found = paired([3.4545, 3.4441, 3.4091], [3.5158, 3.5400, 3.4696])
    assert found.each == pytest.approx((-0.0613, -0.0959, -0.0605))
    assert found.mean == pytest.approx(-0.07257, abs=1e-5)
    assert found.t == pytest.approx(-6.21, abs=0.01)
    assert found.student == pytest.approx((-0.1228, -0.0223), abs=1e-4)
    assert found.p == pytest.approx(0.0250, abs=2e-4)


def test_what_cannot_be_said():
    one = paired([2.0], [3.0])
    assert one.mean == -1 and one.student is None and one.bootstrap is None and one.p is None
    same = paired([2.0, 3.0], [1.0, 2.0])
    assert same.bootstrap == same.student == (1, 1) and same.p == 0
    for values, others in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match="pairs"):
            paired(values, others)


def runs(rng, count, difference, *, of_pair=0.03, of_run=0.01):
    """Losses of paired runs: what a seed brings to both is larger than what tells them apart."""
    seed = rng.normal(3.5, of_pair, count)
    noise = rng.normal(0, of_run, (2, count))
    return (seed + difference + noise[0]).tolist(), (seed + noise[1]).tolist()


@pytest.mark.parametrize("count", [3, 5, 10])
def test_student_is_wrong_as_often_as_it_says(count):
    """False positives without a difference, and coverage of one, of 1,500 studies each: within four
    standard errors of 5 %."""
    rng, studies = np.random.default_rng(count), 1500
    error = math.sqrt(0.05 * 0.95 / studies)
    for difference in (0.0, -0.02):
        missed = 0
        for _ in range(studies):
            each = np.subtract(*runs(rng, count, difference))
            missed += difference not in student_interval(each.tolist())
        assert missed / studies == pytest.approx(0.05, abs=4 * error)


def test_p_is_uniform_without_a_difference():
    rng = np.random.default_rng(7)
    p = np.sort([student.two_sided(_t(rng.normal(size=4)), 3) for _ in range(2000)])
    even = (np.arange(2000) + 0.5) / 2000
    assert np.abs(p - even).max() < 1.63 / math.sqrt(2000)  # Kolmogorov-Smirnov at 1 %


def _t(values):
    return values.mean() / (values.std(ddof=1) / math.sqrt(len(values)))


def test_pairs_find_what_single_runs_do_not():
    rng = np.random.default_rng(1)
    found = alone = 0
    for _ in range(300):
        values, baseline = runs(rng, 5, -0.03)
        difference = student_interval(np.subtract(values, baseline).tolist())
        found += difference.high < 0
        alone += student_interval(values).high < student_interval(baseline).low
    assert found > 250 and alone < 30


@pytest.mark.parametrize(
    ("count", "least", "most"), [(40, 0.90, 0.98), (3, 0.60, 0.85)], ids=["enough pairs", "too few"]
)
def test_bootstrap_covers_with_enough_pairs(count, least, most):
    """Of 3 pairs it covers some three quarters, which the docs say."""
    rng, studies = np.random.default_rng(count), 400
    covered = sum(
        0.5 in bootstrap_interval(rng.normal(0.5, 0.1, count), resamples=999, seed=number)
        for number in range(studies)
    )
    assert least < covered / studies < most


def test_bootstrap_follows_the_skew_and_its_seed():
    values = np.random.default_rng(0).exponential(1.0, 30).tolist()
    low, high = bootstrap_interval(values, seed=1)
    mean = sum(values) / len(values)
    assert high - mean > 1.1 * (mean - low)
    assert bootstrap_interval(values, seed=1) == (low, high)
    assert bootstrap_interval(values, seed=2) != (low, high)
