"""How even a load is, from its definition."""

from __future__ import annotations

import math

import pytest
import torch

from attnres_train.model.moe.balance import Balance, balance_of


def test_even_loads():
    assert balance_of([torch.full((8,), 3)] * 2, 4) == pytest.approx(Balance(2, 1.0, 0.0, 1.0))


def test_the_worst_layer_counts_and_entropies_are_averaged():
    layers = [torch.tensor([6, 2, 0, 0]), torch.tensor([2, 2, 2, 2])]
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
    expected = Balance(2, (entropy + 1) / 2, 6 / 2 - 1, 8 / 4)
    assert balance_of(layers, 2) == pytest.approx(expected)
    assert balance_of(layers, 1).rank_load == 1


@pytest.mark.parametrize("loads", [[torch.zeros(4, dtype=torch.int64)], [torch.tensor([5])]])
def test_nothing_to_spread(loads):
    assert all(math.isfinite(value) for value in balance_of(loads, 1))


def test_no_layers():
    assert balance_of([], 2) == Balance(0, 0, 0, 0)
