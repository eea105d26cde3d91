"""What could be wrong where ranks share samples."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor


def _dropped_tail() -> Any:
    """A short convolution sees nothing in front of its share."""
    from attnres_train.parallel.shares import ShareGroup

    return mock.patch.object(ShareGroup, "pass_on", lambda _, ends: torch.zeros_like(ends))


def _scan_by_ranks() -> Any:
    """States pass from rank to rank, though every second share lies the other way round."""
    from attnres_train.parallel import shares

    def by_ranks(maps: Tensor, ends: Tensor) -> list[Tensor]:
        ranks = maps.shape[1] // 2
        order = [s for rank in range(ranks) for s in (rank, 2 * ranks - 1 - rank)]
        found = scan(maps[:, order], ends[:, order])
        return [found[order.index(share)] for share in range(2 * ranks)]

    scan = shares.scan
    return mock.patch.object(shares, "scan", by_ranks)


def _loss_by_local_tokens() -> Any:
    """A rank divides by its own number of tokens with a loss, as if all had as many."""
    from attnres_train.model.batch import MicroBatch
    from attnres_train.model.shares import Shares

    def by_own(self: MicroBatch, shares: Shares) -> MicroBatch:
        here = of(self, shares)
        ranks = shares.count // len(shares.own)
        return replace(here, loss_tokens=here.loss_mask.sum(dtype=torch.float64) * ranks)

    of = MicroBatch.of
    return mock.patch.object(MicroBatch, "of", by_own)


CONTEXT_FAULTS = {
    "dropped-tail": _dropped_tail,
    "scan-by-ranks": _scan_by_ranks,
    "loss-by-local-tokens": _loss_by_local_tokens,
}
