from __future__ import annotations

import pytest

from attnres_train.config.schema import LRScheduleConfig
from attnres_train.optim.schedule import learning_rate


def lr(step: int, train_iters: int = 100, **schedule) -> float:
    return learning_rate(step, LRScheduleConfig(**schedule), peak=2.0, train_iters=train_iters)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(1, 0.2), (5, 1.0), (10, 2.0), (55, 1.1), (100, 0.2), (150, 0.2)],
)
def test_cosine(step, expected):
    assert lr(step, kind="cosine", warmup_iters=10, min_lr_ratio=0.1) == pytest.approx(expected)


@pytest.mark.parametrize(("step", "expected"), [(20, 1.5), (30, 1.0), (60, 0.0), (90, 0.0)])
def test_cosine_ends_at_decay_iters(step, expected):
    rate = lr(step, kind="cosine", decay_iters=60, min_lr_ratio=0.0)
    assert rate == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("step", "expected"), [(2, 1.0), (4, 2.0), (80, 2.0), (90, 1.0), (95, 0.5), (100, 0.0)]
)
def test_wsd_decays_over_the_last_fifth(step, expected):
    assert lr(step, kind="wsd", warmup_iters=4, min_lr_ratio=0.0) == pytest.approx(expected)


@pytest.mark.parametrize(("step", "expected"), [(60, 2.0), (80, 1.2), (100, 0.4)])
def test_wsd_with_its_own_length(step, expected):
    schedule = {"kind": "wsd", "decay_iters": 40, "min_lr_ratio": 0.2}
    assert lr(step, **schedule) == pytest.approx(expected)


@pytest.mark.parametrize(("step", "expected"), [(1, 0.5), (4, 2.0), (5, 2.0), (1000, 2.0)])
def test_constant(step, expected):
    assert lr(step, kind="constant", warmup_iters=4) == expected


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize(("warmup", "iters"), [(0, 1), (1, 1), (3, 2), (5, 5), (9, 10)])
def test_short_runs_stay_between_zero_and_the_peak(kind, warmup, iters):
    rates = [lr(s, iters, kind=kind, warmup_iters=warmup) for s in range(1, iters + 1)]
    assert all(0 < rate <= 2.0 for rate in rates)


def test_updates_are_counted_from_one():
    with pytest.raises(ValueError, match="counted from 1"):
        lr(0)
