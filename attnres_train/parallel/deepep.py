"""Expert parallelism by DeepEP's kernels, through megatron-core: CUDA, bf16 tokens, fp32 weights.

Like the exact exchange it sends a token once to each rank with experts of it, and one sum back.

Shapes: N tokens of this rank, D hidden size, K experts per token; M tokens that come here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from attnres_train.errors import UserError
from attnres_train.megatron import megatron_core
from attnres_train.model.moe.permutation import RaggedPermutation, load_of
from attnres_train.model.ports import Routed, Sent

_KEY = "parallel.expert_dispatcher is deepep"


class DeepEPExchange:
    """`model.ports.TokenExchange` over ``group``, whose ranks hold consecutive experts.

    Raises UserError where DeepEP is not installed. ``bytes_sent`` stays 0: DeepEP does not tell.
    """

    bytes_sent = overflow = 0

    def __init__(self, num_experts: int, group: ProcessGroup) -> None:
        self.kernels: Any = megatron_core("transformer.moe.fused_a2a")
        if not self.kernels.HAVE_DEEP_EP:
            raise UserError(
                f"{_KEY}, but the package deep_ep is not installed: install DeepEP "
                "(github.com/deepseek-ai/DeepEP), or take exact"
            )
        share = num_experts // group.size()
        self.group, self.num_experts = group, num_experts
        self.experts = range(group.rank() * share, (group.rank() + 1) * share)

    def send(self, tokens: Tensor, experts: Tensor, weights: Tensor, dtype: torch.dtype) -> Sent:
        if dtype is not torch.bfloat16:
            raise UserError(
                f"{_KEY}, which sends bf16, but experts compute in {dtype}: set train.precision to "
                "bf16 or bf16_params, or take exact"
            )
        return _Sent(self, tokens.to(dtype), experts, weights)


class _Sent:
    """One call of the exchange."""

    def __init__(
        self, exchange: DeepEPExchange, tokens: Tensor, experts: Tensor, weights: Tensor
    ) -> None:
        self.exchange = exchange
        self.load = load_of(experts, exchange.num_experts)
        dispatched = exchange.kernels.fused_dispatch(
            tokens, experts, weights.float(), exchange.num_experts, exchange.group
        )
        # Experts [M, K] are counted from the first one here; -1: the choice is another rank's.
        self.tokens, self.told, self.weights, _, self.handle = dispatched

    def arrived(self) -> Routed:
        token, choice = (self.told >= 0).nonzero(as_tuple=True)
        pairs = RaggedPermutation.sort(
            token, self.told[token, choice].long(), len(self.tokens), len(self.exchange.experts)
        )
        return Routed(self.tokens, self.weights[token, choice], pairs)

    def back(self, sums: Tensor) -> Tensor:
        combined, _ = self.exchange.kernels.fused_combine(
            sums.to(torch.bfloat16), self.exchange.group, self.handle
        )
        return combined
