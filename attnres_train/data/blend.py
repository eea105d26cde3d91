"""Several corpora as one sequence of samples, each at its weight all along."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from attnres_train.data.megatron import megatron_datasets

# Samples that are dealt to corpora at once, at least: ten bytes each.
FIRST_SAMPLES = 1 << 20


class Blend:
    """megatron-core's BlendedDataset of ``num_samples`` samples, of which no more is dealt to
    corpora than is asked for: an index of the whole run takes ten bytes a sample in every process,
    however soon the run is stopped.

    Sample i goes to the corpus that is furthest behind its share of the samples before i, so that
    dealing more extends the same sequence.
    """

    def __init__(self, datasets: Sequence[Any], weights: Sequence[float], num_samples: int) -> None:
        """``datasets`` as BlendedDataset takes them, at ``weights`` relative to each other."""
        self.datasets = list(datasets)
        self.weights = list(weights)
        self.num_samples = num_samples
        self._dealt = self._deal(FIRST_SAMPLES)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises IndexError for ``index`` outside [0, ``num_samples``)."""
        self._reach(index)
        return self._dealt[index]

    def corpus(self, index: int) -> int:
        """The number of the corpus that sample ``index`` is of. Raises IndexError as above."""
        self._reach(index)
        return int(self.dataset_index[index])

    def _reach(self, index: int) -> None:
        """Deal samples up to ``index``."""
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of a blend of {self.num_samples}")
        if index >= len(self._dealt):
            # Twice as many, so that all dealing together costs no more than twice the last.
            del self._dealt
            self._dealt = self._deal(2 * (index + 1))

    @property
    def dataset_index(self) -> np.ndarray:
        """The number of the corpus of each sample that is dealt, int16."""
        return self._dealt.dataset_index

    def _deal(self, num_samples: int) -> Any:
        """The first ``num_samples``, or all."""
        blended_dataset = megatron_datasets("blended_dataset")
        # Through its cache, only rank 0 of torch.distributed would build.
        settings = replace(
            self.datasets[0].dataset.config, path_to_cache=None, fast_cache_load=False
        )
        size = min(num_samples, self.num_samples)
        return blended_dataset.BlendedDataset(self.datasets, self.weights, size, settings)


def taken(weights: Sequence[float], num_samples: int) -> list[int]:
    """How many of the first ``num_samples`` samples of a `Blend` come from each corpus."""
    if len(weights) == 1 or not num_samples:
        return [num_samples] + [0] * (len(weights) - 1)
    shares = np.array(weights, np.float64) / sum(weights)
    dealt, of_corpus = np.empty(num_samples, np.int16), np.empty(num_samples, np.int64)
    helpers = megatron_datasets("helpers")
    helpers.build_blending_indices(dealt, of_corpus, shares, len(weights), num_samples, False)
    return np.bincount(dealt, minlength=len(weights)).tolist()
