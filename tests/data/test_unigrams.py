from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from attnres_train.data import unigrams
from attnres_train.data.unigrams import check_ids, count_unigrams, unigram_entropy
from attnres_train.errors import UserError


def dataset(*sequences: list[int], dtype=np.uint16) -> SimpleNamespace:
    """What `count_unigrams` reads of a GPTDataset."""
    arrays = [np.array(sequence, dtype) for sequence in sequences]

    def get(index: int, offset: int, length: int) -> np.ndarray:
        assert length <= unigrams.COUNT_AT_ONCE, "a long document comes in pieces"
        return arrays[index][offset : offset + length]

    stored = SimpleNamespace(get=get, length=lambda index: len(arrays[index]))
    return SimpleNamespace(document_index=np.arange(len(arrays)), dataset=stored)


def test_entropy_by_hand():
    counts = np.array([2, 1, 1, 0])
    assert unigram_entropy([counts], [3.0]) == pytest.approx(1.5 * math.log(2))
    assert unigram_entropy([np.array([7, 0])], [1.0]) == 0
    assert unigram_entropy([np.full(16, 5)], [1.0]) == pytest.approx(math.log(16))


def test_a_blend_mixes_distributions_by_weight():
    # p = 1/4 (1, 0) + 3/4 (0, 1), however many tokens each corpus has.
    told = unigram_entropy([np.array([1000, 0]), np.array([0, 2])], [1.0, 3.0])
    assert told == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))


@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_every_token_is_counted_once(monkeypatch, at_once):
    monkeypatch.setattr(unigrams, "COUNT_AT_ONCE", at_once)
    counts = count_unigrams(dataset([0, 2, 2], [3], [2, 0]), 5, "here")
    assert counts.tolist() == [2, 0, 3, 1, 0]


def test_large_corpora_are_sampled(monkeypatch):
    monkeypatch.setattr(unigrams, "COUNT_AT_ONCE", 2)
    monkeypatch.setattr(unigrams, "UNIGRAM_TOKENS", 4)
    assert count_unigrams(dataset([1, 1], [1, 1], [4, 4]), 3, "here").tolist() == [0, 4, 0]


def test_ids_outside_the_vocabulary():
    with pytest.raises(UserError) as caught:
        count_unigrams(dataset([0, 1], [5, 2]), 5, "data.corpus.1 (indexed x)")
    assert str(caught.value) == (
        "data.corpus.1 (indexed x) holds token id 5, but model.vocab_size is 5: it was tokenised "
        "for another vocabulary"
    )
    with pytest.raises(UserError, match="token id -3"):
        count_unigrams(dataset([0, -3], dtype=np.int32), 5, "here")
    check_ids(np.array([0, 4]), 5, "here")
