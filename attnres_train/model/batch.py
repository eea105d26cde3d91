"""The input of a chunk. Shapes: B samples of a micro-batch, T tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnres_train.model.probe import Probe
from attnres_train.model.shares import Shares


@dataclass
class MicroBatch:
    """One micro-batch, the same on every pipeline rank. Of ranks that share its tokens each has
    some of them (`of`), and what else it holds is that of the whole samples.

    ``tokens`` and ``labels`` are int64 [B, T] (labels are the tokens one position later),
    ``loss_mask`` float [B, T] weights each position's loss. ``cu_seqlens`` int32 gives the
    cumulative document lengths [0, ..., B*T] of packed samples, None when every sample is one
    document; the end of a sample always ends a document. ``loss_tokens``, a float scalar, is what
    the sum of the weighted losses is divided by, None for the sum of ``loss_mask``: the same for
    all micro-batches of a step, it makes the mean of their losses one over the step's tokens.
    ``groups``, float [B, G], asks for G losses, without gradients, in place of one: in each of them
    a sample counts with its weight there, and all divide by the same.
    ``probe`` looks at the micro-batch on its way through the model, None: nobody does.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    cu_seqlens: Tensor | None = None
    loss_tokens: Tensor | None = None
    groups: Tensor | None = None
    probe: Probe | None = None

    def of(self, shares: Shares) -> MicroBatch:
        """What is here of it; needs ``loss_tokens``, which do not follow from a part.

        Raises ValueError without them.
        """
        if shares.count == 1:
            return self
        if self.loss_tokens is None:
            raise ValueError("a part of a micro-batch needs loss_tokens, those of the whole")
        of = shares.of
        return replace(
            self, tokens=of(self.tokens), labels=of(self.labels), loss_mask=of(self.loss_mask)
        )

    @property
    def loss_weights(self) -> Tensor:
        """What the loss of each token is weighted by: [B T], or [B T, G] of ``groups``."""
        if self.groups is None:
            return self.loss_mask.flatten()
        return (self.loss_mask.unsqueeze(-1) * self.groups.unsqueeze(1)).flatten(0, 1)

    @classmethod
    def of_samples(
        cls, samples: Mapping[str, Tensor], loss_tokens: Tensor | None = None
    ) -> MicroBatch:
        """Of ``samples`` as they are read: tokens, labels, loss_mask, cu_seqlens where packed."""
        return cls(
            samples["tokens"],
            samples["labels"],
            samples["loss_mask"],
            samples.get("cu_seqlens"),
            loss_tokens,
        )

    @classmethod
    def of_tokens(cls, tokens: Tensor) -> MicroBatch:
        """``tokens`` [B, T] for the sake of what the model makes of them: none is in the loss."""
        return cls(tokens, tokens, torch.zeros_like(tokens, dtype=torch.float32))

    def to(self, device: torch.device | str) -> MicroBatch:
        moved: dict[str, Any] = {
            n: x.to(device) for n, x in vars(self).items() if isinstance(x, Tensor)
        }
        return replace(self, **moved)
