"""The micro-batches of a step on their way to the device, and the counts that they divide by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

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
        return self.mean_over_replicas(
            [batch["loss_mask"].sum(dtype=torch.float64) for batch in batches]
        )

    def mean_over_replicas(self, counts: Sequence[Tensor]) -> Tensor:
        """The mean of a tensor, fp64, that there is for each micro-batch here, over all replicas:
        on the device. Collective."""
        data, total = self.ranks.data, torch.stack([*counts]).sum(0)
        return sum_over(total.to(self.ranks.device), data) / (len(counts) * data.size())

    def to_device(
        self, batches: Sequence[Batch], loss_tokens: Tensor, groups: Sequence[Tensor] = ()
    ) -> list[MicroBatch]:
        """What is here of the batches of a step, on the device. All divide by ``loss_tokens``, the
        step's mean, so that the mean over micro-batches and replicas is that over all tokens with a
        loss. ``groups``: `MicroBatch.groups` of each, if they have some."""
        whole = [MicroBatch.of_samples(batch, loss_tokens) for batch in batches]
        if groups:
            pairs = zip(whole, groups, strict=True)
            whole = [replace(batch, groups=of_samples) for batch, of_samples in pairs]
        return [batch.of(self.shares).to(self.ranks.device) for batch in whole]
