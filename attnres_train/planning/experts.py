"""What ranks that share routed experts send each other (`parallel.experts`), where every expert is
as likely as any other."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from attnres_train.config.schema import RunConfig

_TOLD, _WEIGHT = 4, 4  # bytes of a pair: which expert, and its weight in fp32


@dataclass(frozen=True)
class ExchangeBytes:
    """Of one MoE layer, micro-batch and rank: bytes to other ranks. Zero with a rank alone."""

    ranks: int
    experts_per_rank: int
    ranks_per_token: float
    """Other ranks that a token goes to, room included that is left empty."""
    forward: float
    backward: float
    """What is sent again by activation recomputation included."""
    per_pair: float
    """What forward and backward would be if a token went as often as it has experts elsewhere."""


def exchange_bytes(config: RunConfig, number_bytes: int) -> ExchangeBytes:
    """Of ``config``, where a number in a matmul's input has ``number_bytes``."""
    moe, train = config.model.moe, config.train
    ranks = config.parallel.expert_model_parallel_size
    experts, chosen = moe.num_experts, moe.num_experts_per_token
    share = experts // ranks
    tokens = train.micro_batch_size * train.seq_length
    copies = (ranks - 1) * moe.reached(ranks)
    pairs = chosen * (1 - share / experts)
    if config.parallel.expert_dispatcher == "bounded" and ranks > 1:  # empty room travels too
        factor = config.parallel.expert_capacity_factor
        copies = (ranks - 1) * min(tokens, ceil(factor * tokens * moe.reached(ranks))) / tokens
        pairs = copies * min(chosen, share)
    row = config.model.hidden_size * number_bytes
    again = 1 if train.recompute == "full" else 0
    send = tokens * (copies * row + pairs * (_TOLD + _WEIGHT))
    back = tokens * copies * row
    gradients = 2 * back + tokens * pairs * _WEIGHT
    return ExchangeBytes(
        ranks=ranks,
        experts_per_rank=share,
        ranks_per_token=copies,
        forward=send + back,
        backward=gradients + again * send,
        per_pair=tokens * pairs * ((4 + again) * row + (2 + again) * _WEIGHT + (1 + again) * _TOLD),
    )
