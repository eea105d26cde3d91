"""What a checkpoint does to an optimizer, without files."""

from __future__ import annotations

import torch
from torch import Tensor

from attnres_train.optim.hybrid import HybridOptimizer

Optimized = tuple[dict[str, Tensor], HybridOptimizer]


@torch.no_grad()
def copy_state(source: Optimized, target: Optimized) -> None:
    """Copy parameters and the whole state, in place; names, order and shapes must agree."""
    (params, optimizer), (resumed, second) = source, target
    for name, param in params.items():
        resumed[name].copy_(param)
    pairs = zip(second.state_tensors(), optimizer.state_tensors(), strict=True)
    for (name, key, tensor), (source_name, source_key, value) in pairs:
        assert (name, key) == (source_name, source_key)
        assert value.shape == params[name].shape
        tensor.copy_(value)
    second.steps.copy_(optimizer.steps)
