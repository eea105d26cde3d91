"""The blend of several corpora, against megatron-core's BlendedDataset, of which it is a part."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from attnres_train.data import blend
from attnres_train.data.blend import Blend, taken
from attnres_train.data.loader import open_data
from attnres_train.data.megatron import megatron_datasets
from attnres_train.data.prepare import prepare
from tests.data.tiny import run_config, text_corpus, write_text

WEIGHTS = [(0.7, 0.3), (1.0, 2.0, 5.0), (1e-3, 1.0), (1.0, 1.0, 1.0, 1.0)]


@pytest.fixture
def members(tmp_path):
    """Opened corpora, as many as asked for."""

    def opened(number: int) -> list:
        corpora = [
            text_corpus(write_text(tmp_path / str(n), 20, first=300 * n)) for n in range(number)
        ]
        config = run_config(tmp_path / "cache", corpora)
        return open_data(config, prepare(config, progress=False)).train.datasets

    return opened


def whole(members: list, weights: tuple[float, ...], num_samples: int):
    settings = replace(members[0].dataset.config, path_to_cache=None, fast_cache_load=False)
    blended_dataset = megatron_datasets("blended_dataset")
    return blended_dataset.BlendedDataset(members, list(weights), num_samples, settings)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_it_deals_as_megatron_does_for_the_whole_run(members, monkeypatch, weights):
    monkeypatch.setattr(blend, "FIRST_SAMPLES", 3)
    datasets = members(len(weights))
    expected = whole(datasets, weights, 500)
    dealt = Blend(datasets, weights, 500)
    assert len(dealt) == len(expected) == 500
    for index in (0, 2, 3, 11, 10, 200, 499, 1):
        one, other = dealt[index], expected[index]
        assert one.keys() == other.keys()
        assert one["dataset_id"] == other["dataset_id"]
        assert all(np.array_equal(one[name], other[name]) for name in one)
    assert np.array_equal(dealt.dataset_index, expected.dataset_index)


def test_no_more_is_dealt_than_is_asked_for(members, monkeypatch):
    monkeypatch.setattr(blend, "FIRST_SAMPLES", 8)
    dealt = Blend(members(2), (0.7, 0.3), 10**12)
    sizes = []
    for index in range(100):
        dealt[index]
        sizes.append(len(dealt.dataset_index))
    assert sizes[:8] == [8] * 8 and sizes[-1] < 200
    assert len(set(sizes)) < 8, "and rarely dealt anew"
    for index in (-1, 10**12):
        with pytest.raises(IndexError):
            dealt[index]


def test_a_run_of_a_million_million_steps(tmp_path: Path):
    """It took 10 bytes a sample of the run in every process: 36 TiB here."""
    corpora = [text_corpus(write_text(tmp_path / name, 20)) for name in "ab"]
    config = run_config(tmp_path / "cache", corpora, train__eval_interval=10**6)
    prepared = prepare(config, progress=False)
    short = open_data(config, prepared)
    config.train.train_iters = 10**12
    tracemalloc.start()
    long = open_data(config, prepared)
    first = long.micro_batches(0, 0, 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 << 20
    for one, other in zip(first, short.micro_batches(0, 0, 1), strict=True):
        assert all((one[name] == other[name]).all() for name in one)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("count", [0, 1, 7, 400])
def test_how_many_are_taken_of_each(members, weights, count):
    """From which sample of a corpus files that come later count."""
    dealt = Blend(members(len(weights)), weights, 500).dataset_index[:count]
    assert taken(weights, count) == [int((dealt == n).sum()) for n in range(len(weights))]


def test_of_a_single_corpus_all_are_taken():
    assert taken([3.0], 10**15) == [10**15]
