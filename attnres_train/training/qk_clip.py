"""QK-clip in a step of the run: whose logits count, and what is logged of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from attnres_train.model.chunk import ModelChunk
from attnres_train.model.qk_clip import row_factors, watched
from attnres_train.parallel.ranks import Ranks


class QKClip:
    """Of a step: `begin`; all its micro-batches; `of_step`; and `factors`, if it is taken. Keeps
    nothing from one step to the next. With ``threshold`` 0 there is nothing to do, and nothing is
    watched."""

    def __init__(self, threshold: float, chunks: Mapping[int, ModelChunk], ranks: Ranks) -> None:
        self.threshold, self.ranks = threshold, ranks
        of_chunks = [watched(chunk) for chunk in chunks.values()] if threshold else []
        self.layers = {name: layer for layers in of_chunks for name, layer in layers.items()}

    @property
    def _largest(self) -> list[Tensor]:
        """[heads here] of every layer, fp64."""
        return [layer.max_logits for layer in self.layers.values() if layer.max_logits is not None]

    def begin(self) -> None:
        for largest in self._largest:
            largest.fill_(-torch.inf)

    def of_step(self) -> dict[str, float]:
        """What is logged: ``max_attention_logit``, the largest of the step and the whole model.
        Collective over all ranks."""
        if not self.threshold:
            return {}
        none = torch.full((1,), -torch.inf, dtype=torch.float64, device=self.ranks.device)
        largest = torch.cat([none, *self._largest]).max()
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return {"max_attention_logit": largest.item()}

    def factors(self) -> Mapping[str, Tensor]:
        """`model.qk_clip.row_factors` by the logits of all samples of the step. Collective over the
        ranks that hold the same heads."""
        if largest := self._largest:
            flat = torch.cat(largest)
            dist.all_reduce(flat, dist.ReduceOp.MAX, group=self.ranks.shards)
            for mine, of_all in zip(largest, flat.split([len(x) for x in largest]), strict=True):
                mine.copy_(of_all)
        return row_factors(self.layers, self.threshold)
