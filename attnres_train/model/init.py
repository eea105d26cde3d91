"""Initial weights that depend on the seed and each tensor's released name alone: not on the grid,
the device or the parameter dtype."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from attnres_train.model.chunk import ModelChunk
from attnres_train.model.moe.layer import routers
from attnres_train.model.naming import released_tensors
from attnres_train.model.parameters import ParameterRule, parameter_rules


@torch.no_grad()
def init_weights(chunk: ModelChunk, seed: int) -> None:
    """Fill every parameter and router buffer of ``chunk`` (which may come from ``to_empty``).

    Each parameter begins as its `ParameterRule` says, drawn in fp32 on the CPU with one generator
    per released tensor: all of it, also where a part of it is kept. Raises ValueError for a
    parameter without a rule.
    """
    rules, first_expert = parameter_rules(chunk), chunk.ports.exchange.experts.start
    split = chunk.ports.split
    for name, parameter in chunk.named_parameters():
        rule = rules[name]
        for released, tensor in released_tensors([(name, parameter)], first_expert):
            value = initial_value(rule, released, split.whole(tensor.shape, rule.split), seed)
            tensor.copy_(split.mine(value, rule.split))
    for router in routers(chunk):
        router.e_score_correction_bias.zero_()
        router.tokens_per_expert.zero_()


def initial_value(rule: ParameterRule, name: str, shape: Sequence[int], seed: int) -> Tensor:
    """What the tensor of released ``name`` begins as, fp32 on the CPU."""
    value = torch.empty(shape, device="cpu")
    rule.init(value, _generator(seed, name))
    return value


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
