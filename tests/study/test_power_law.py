"""Fits of loss over compute: known laws, their uncertainty, and the published ones."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from attnres_train.config import load_config
from attnres_train.study.compute import model_flops_per_token
from attnres_train.study.power_law import (
    PFLOPS_DAY,
    PowerLaw,
    compute_multiplier,
    fit,
    fit_with_uncertainty,
    multiplier_interval,
)

CONFIGS = Path(__file__).parents[2] / "configs"
COMPUTE = [0.66, 1.0, 1.63, 3.24, 5.38]


@pytest.mark.parametrize("floor", [0.0, 1.2])
def test_a_law_is_found_again(floor):
    law = PowerLaw(0.7, 0.12, floor)
    found = fit(COMPUTE, [law.loss(c) for c in COMPUTE], floor=floor > 0)
    assert (found.scale, found.exponent, found.floor) == pytest.approx(
        (law.scale, law.exponent, law.floor), rel=1e-3
    )
    assert found.compute(found.loss(2.5)) == pytest.approx(2.5)


def test_a_floor_is_not_below_zero():
    losses = [3.0 - 0.4 * math.log(c) for c in COMPUTE]  # falls faster than any power
    assert fit(COMPUTE, losses, floor=True).floor >= 0


def test_what_no_compute_reaches():
    assert PowerLaw(1.0, 0.1, 2.0).compute(1.9) == math.inf
    assert PowerLaw(1.0, -0.1).compute(0.5) == math.inf


@pytest.mark.parametrize("floor", [False, True])
def test_too_few_points(floor):
    with pytest.raises(ValueError, match="points of different compute"):
        fit_with_uncertainty([1, 2, 2], [3, 2, 2], floor=floor)


def test_the_exponent_is_covered_as_often_as_it_says():
    rng, law, studies = np.random.default_rng(0), PowerLaw(1.9, 0.057), 1000
    covered = 0
    for _ in range(studies):
        noise = np.exp(rng.normal(0, 0.002, len(COMPUTE)))
        found = fit_with_uncertainty(COMPUTE, [law.loss(c) for c in COMPUTE] * noise)
        covered += law.exponent in found.exponent
    assert covered / studies == pytest.approx(0.95, abs=4 * math.sqrt(0.05 * 0.95 / studies))


def test_the_multiplier_is_covered():
    """Of 12 sizes, whose two losses share half of their noise."""
    rng, studies = np.random.default_rng(3), 20
    compute = np.geomspace(0.5, 8, 12)
    baseline, better = PowerLaw(1.891, 0.057), PowerLaw(1.870, 0.058)
    true, covered = compute_multiplier(baseline, better, 5.6), 0
    for _ in range(studies):
        shared, own = rng.normal(0, 0.001, 12), rng.normal(0, 0.001, (2, 12))
        losses = [
            [law.loss(c) for c in compute] * np.exp(shared + one)
            for law, one in zip((baseline, better), own, strict=True)
        ]
        covered += true in multiplier_interval(compute, *losses, 5.6)
    assert 0.8 <= covered / studies <= 1


def test_intervals_with_a_floor_hold_the_law():
    rng, law = np.random.default_rng(5), PowerLaw(0.7, 0.3, 1.2)
    compute = np.geomspace(0.1, 30, 9)
    losses = [law.loss(c) for c in compute] * np.exp(rng.normal(0, 0.001, 9))
    found = fit_with_uncertainty(compute, losses, floor=True)
    assert law.exponent in found.exponent and law.floor in found.floor and law.scale in found.scale


# arXiv 2603.15031, Table 2: tokens, and validation losses of standard, block and full; Fig. 4: the
# fits A C^-alpha, C in PFLOP/s-days.
TABLE_2 = {
    "194m": (38.7e9, 1.931, 1.909, 1.899),
    "241m": (45.4e9, 1.895, 1.875, 1.874),
    "296m": (62.1e9, 1.829, 1.809, 1.804),
    "436m": (87.9e9, 1.766, 1.746, 1.737),
    "528m": (119.0e9, 1.719, 1.693, 1.692),
}
FIG_4 = {1: (1.891, 0.057), 2: (1.870, 0.058), 3: (1.865, 0.057)}


def published(column: int) -> tuple[list[float], list[float]]:
    """Compute, which the paper draws but does not print, by the models' FLOPs; and losses."""
    compute, losses = [], []
    for size, row in TABLE_2.items():
        config = load_config(CONFIGS / f"table2_{size}.yaml", ["model.residual.kind=standard"])
        compute.append(model_flops_per_token(config) * row[0] / PFLOPS_DAY)
        losses.append(row[column])
    return compute, losses


@pytest.mark.parametrize("column", FIG_4)
def test_the_published_points_give_the_published_fit(column):
    """The exponents within the rounding of points and fit. The scales hang on the unit of compute:
    3 % more of it, one factor for all three, and they are met too."""
    compute, losses = published(column)
    scale, exponent = FIG_4[column]
    x = np.log(compute) - np.log(compute).mean()
    rounding = 0.0005 * np.abs(x / (x @ x) / losses).sum()  # of the losses, at its worst
    assert abs(fit(compute, losses).exponent - exponent) <= 0.0005 + rounding
    law = fit([1.03 * c for c in compute], losses)
    assert law.scale == pytest.approx(scale, abs=0.0005 + 0.001)
    uncertain = fit_with_uncertainty(compute, losses)
    assert exponent in uncertain.exponent and scale in uncertain.scale


def test_the_published_multiplier():
    """At 5.6 PFLOP/s-days 1.714 against 1.692, 1.25 times the compute."""
    baseline, block = PowerLaw(*FIG_4[1]), PowerLaw(*FIG_4[2])
    assert (baseline.loss(5.6), block.loss(5.6)) == pytest.approx((1.714, 1.692), abs=0.0005)
    assert compute_multiplier(baseline, block, 5.6) == pytest.approx(1.25, abs=0.01)
    compute, losses = published(1)
    interval = multiplier_interval(compute, losses, published(2)[1], 5.6)
    assert 1.25 in interval and interval.low > 1
