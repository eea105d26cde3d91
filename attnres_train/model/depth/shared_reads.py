"""Phase 1 of the depth reads of one block, which can be run again in the backward pass.

Shapes: D hidden size; blocks are [B, T, D].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attnres_train.model.depth.attention import Phase1, depth_phase1


class SharedReads:
    """One pass over ``blocks`` for all ``queries``: sublayer -> (query [D], key norm weight [D]).

    `take` hands out each result once, so that it lives until its read at most. Asked for one again,
    by a read that is recomputed in its backward pass, phase 1 runs again for all sublayers, on the
    same blocks. The graph is that of the first time; the second makes none.
    """

    def __init__(
        self, queries: Mapping[int, tuple[Tensor, Tensor]], blocks: Sequence[Tensor], eps: float
    ) -> None:
        self.queries, self.blocks, self.eps = queries, blocks, eps
        # Here and not in the first `take`: that may run inside a checkpointed function, and the
        # graph of phase 1 must be made once, outside, for all its readers.
        self._results = self._run()

    def take(self, sublayer: int) -> Phase1:
        if sublayer not in self._results:  # taken before: a backward pass asks, last sublayer first
            self._results = self._run_again()
        return self._results.pop(sublayer)

    def _run(self) -> dict[int, Phase1]:
        results = depth_phase1(list(self.queries.values()), self.blocks, self.eps)
        return dict(zip(self.queries, results, strict=True))

    def _run_again(self) -> dict[int, Phase1]:
        # With gradients on, phase 1 would save its sources among the tensors of the read that is
        # recomputed, and `torch.utils.checkpoint` refuses what was not saved the first time.
        with torch.no_grad():
            results = self._run()
        # Nor may it save fewer: operators save what they are given only if it wants a gradient, so
        # the results become leaves that do. No gradient arrives there: backward follows the graph
        # of the first time and takes mere values from this one.
        for result in results.values():
            for tensor in (result.query, result.o, result.lse):
                tensor.requires_grad_()
        return results
