"""The choice of a token."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from attnres_train.errors import UserError
from attnres_train.inference.sampling import Sampling

LOGITS = torch.tensor([0.5, 3.0, 1.0, 2.0, 3.0])


def draws(sampling: Sampling, count: int = 2000) -> Counter[int]:
    choose = sampling.chooser(0)
    return Counter(choose(LOGITS) for _ in range(count))


def test_greedy_takes_the_first_of_the_likeliest() -> None:
    assert draws(Sampling(temperature=0), 3) == {1: 3}
    assert draws(Sampling(temperature=5, top_k=1), 3) == {1: 3}


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_frequencies(temperature: float) -> None:
    found, chances = draws(Sampling(temperature)), (LOGITS / temperature).softmax(0)
    for token, chance in enumerate(chances.tolist()):
        assert found[token] / 2000 == pytest.approx(chance, abs=0.05)


def test_what_is_left_out() -> None:
    assert set(draws(Sampling(5, top_k=3))) == {1, 4, 3}
    # 1 and 4 have 0.40 each, 3 has 0.15.
    assert set(draws(Sampling(1, top_p=0.3))) == {1}
    assert set(draws(Sampling(1, top_p=0.7))) == {1, 4}
    assert set(draws(Sampling(1, top_p=0.9))) == {1, 4, 3}
    assert set(draws(Sampling(5, top_p=0.99, top_k=2))) == {1, 4}


def test_draws_are_of_the_seed_and_the_number_of_the_text() -> None:
    def text(seed: int, row: int) -> list[int]:
        choose = Sampling(2.0, seed=seed).chooser(row)
        return [choose(LOGITS) for _ in range(20)]

    assert text(0, 0) == text(0, 0)
    assert len({tuple(text(seed, row)) for seed in (0, 1) for row in (0, 1)}) == 4


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_k": 0}, "top_k is 0"),
    ],
)
def test_values_out_of_range(options: dict, told: str) -> None:
    with pytest.raises(UserError, match=told):
        Sampling(**options)
