"""The micro-batches of a step on their way to the device, and the counts that they divide by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnres_train.data.loader import Batch
from attnres_train.model.batch import MicroBatch
from attnres_train.model.shares import Shares
from attnres_train.parallel.gradients import sum_over
from attnres_train.parallel.ranks import Ranks


class StepBatches:
    """Makes micro-batches of this rank's batches. ``shares``: which tokens of a sample are here."""

    def __init__(self, ranks: Ranks, shares: Shares) -> None:
        self.ranks, self.shares = ranks, shares

    def mean_loss_tokens(self, batches: Sequence[Batch]) -> Tensor:
        """The mean number of tokens with a loss of a step's micro-batches, over all replicas: fp64,
        shape [], on the device. Collective."""
        return self.mean_over_replicas([batch["loss_mask"] for batch in batches])

    def mean_over_replicas(self, counts: Sequence[Tensor]) -> Tensor:
        """The mean sum of a tensor for each micro-batch here, over all replicas: fp64, shape [],
        on the device. 0 where there are none. Collective."""
        data, zero = self.ranks.data, torch.zeros((), dtype=torch.float64)
        total = sum((count.sum(dtype=torch.float64) for count in counts), zero)
        return sum_over(total.to(self.ranks.device), data) / (max(1, len(counts)) * data.size())

    def to_device(self, batches: Sequence[Batch], loss_tokens: Tensor) -> list[MicroBatch]:
        """What is here of the batches of a step, on the device. All divide by ``loss_tokens``, the
        step's mean, so that the mean over micro-batches and replicas is that over all tokens with a
        loss."""
        whole = (MicroBatch.of_samples(batch, loss_tokens) for batch in batches)
        return [batch.of(self.shares).to(self.ranks.device) for batch in whole]
