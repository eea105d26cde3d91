"""Ratios and their standard errors: by hand, and against how much they scatter."""

from __future__ import annotations

import math

import numpy as np
import pytest

from attnres_train.evaluation.figures import Sums, ratio


def test_of_equal_sizes_it_is_the_mean_and_its_error():
    values = np.array([1.0, 2.0, 4.0, 9.0])
    value, error = ratio(values * 5, np.full(4, 5.0))
    assert value == pytest.approx(4.0)
    assert error == pytest.approx(values.std(ddof=1) / 2)


def test_the_error_is_how_much_the_ratio_scatters():
    """Over many draws of sequences that differ in length and in loss."""
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(2000):
        tokens = rng.integers(20, 100, 60).astype(float)
        nats = tokens * (3 + rng.normal(0, 0.5, 60)) + 0.01 * tokens**2
        drawn.append(ratio(nats, tokens))
    values, errors = np.array(drawn).T
    assert errors.mean() == pytest.approx(values.std(), rel=0.05)


def test_figures_by_hand():
    sums = Sums(
        np.array([6.0, 4.0, 0.0]), np.array([3.0, 1.0, 0.0]), np.array([8.0, 2.0, 0.0]), np.ones(3)
    )
    found = sums.figures()
    assert found.loss == pytest.approx(10 / 4) and found.tokens == 4 and found.sequences == 2
    # x - R y is -1.5 and 1.5; N / (N - 1) is 2.
    assert found.loss_error == pytest.approx(math.sqrt(2 * (1.5**2 + 1.5**2)) / 4)
    assert found.perplexity == pytest.approx(math.exp(2.5))
    assert found.perplexity_error == pytest.approx(math.exp(2.5) * found.loss_error)
    assert found.bits_per_byte == pytest.approx(10 / math.log(2) / 10)
    assert found.bytes == 10 and found.accuracy == 0.75


def test_what_is_not_known_is_none():
    one = Sums(np.array([6.0]), np.array([3.0]), None, np.zeros(1)).figures()
    assert one.loss == 2 and one.loss_error is one.perplexity_error is None
    assert one.bytes is one.bits_per_byte is one.bits_per_byte_error is None
    assert Sums(np.zeros(2), np.zeros(2), None, np.zeros(2)).figures() is None
