"""Mixture of experts with a sigmoid router and auxiliary-loss-free balancing (Kimi Linear; SwiGLU
experts, one always-on shared expert, no token is dropped).

Shapes: N tokens, D hidden size, F expert width, E experts, K experts per token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnres_train.config.model_schema import MoEConfig
from attnres_train.model.mlp import SwiGLU, swiglu_flops_per_token
from attnres_train.model.moe.grouped import grouped_linear
from attnres_train.model.moe.permutation import combine, dispatch
from attnres_train.model.parameters import ParameterRule, matrices
from attnres_train.model.ports import AllHere, Routed, TokenExchange
from attnres_train.model.split import TensorSplit


class Router(nn.Module):
    """Chooses K experts by ``sigmoid(W x) + bias`` and weighs them by the unbiased sigmoids.

    Buffers: ``e_score_correction_bias``, fp32 [E], has no gradient; `update_router_biases` moves
    it. ``tokens_per_expert``, int64 [E], not saved, counts training tokens since that update.
    """

    e_score_correction_bias: Tensor
    tokens_per_expert: Tensor

    def __init__(self, hidden_size: int, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts))
        load = torch.zeros(config.num_experts, dtype=torch.int64)
        self.register_buffer("tokens_per_expert", load, persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[N, D] -> weights [N, K] in fp32 (fp64 stays) and experts int64 [N, K]."""
        # bf16 has 8 bits: experts with almost equal scores would be chosen by rounding.
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            scores = torch.sigmoid(F.linear(x.to(wide), self.weight.to(wide)))
        biased = scores.detach() + self.e_score_correction_bias
        experts = biased.topk(self.config.num_experts_per_token, dim=-1).indices
        # The bias steers the choice alone: in the weights it would bend outputs for balance's sake.
        chosen = scores.gather(-1, experts)
        weights = chosen / (chosen.sum(-1, keepdim=True) + 1e-20)
        return weights * self.config.routed_scaling_factor, experts

    def parameter_rules(self, std: float) -> dict[str, ParameterRule]:
        return matrices(std, ["weight"], role="router")


class Experts(nn.Module):
    """The routed SwiGLU experts that are here, E of them: ``w1`` (gate) and ``w3`` (up) [E, F, D],
    ``w2`` [E, D, F]."""

    def __init__(self, hidden_size: int, config: MoEConfig, experts: int) -> None:
        super().__init__()
        width = config.intermediate_size
        self.w1 = nn.Parameter(torch.empty(experts, width, hidden_size))
        self.w2 = nn.Parameter(torch.empty(experts, hidden_size, width))
        self.w3 = nn.Parameter(torch.empty(experts, width, hidden_size))

    def forward(self, rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        """Rows sorted by expert [rows, D] and their routing weights [rows] -> [rows, D].

        The weight scales the hidden activation, which equals scaling the output (w2 is linear) and
        spares keeping the output for the weight's gradient.
        """
        # By hand: autocast passes over matmuls that write into ``out``, as `grouped_linear`'s do.
        dtype = _compute_dtype(rows)
        rows = rows.to(dtype)
        gate = grouped_linear(rows, self.w1.to(dtype), ends)
        up = grouped_linear(rows, self.w3.to(dtype), ends)
        hidden = (F.silu(gate) * up * weights.unsqueeze(-1)).to(dtype)
        return grouped_linear(hidden, self.w2.to(dtype), ends)

    def parameter_rules(self, std: float) -> dict[str, ParameterRule]:
        return matrices(std, ["w1", "w2", "w3"], is_expert=True)


class MixtureOfExperts(nn.Module):
    """``sum_k weight_k * expert_k(x) + shared_experts(x)``. Tokens go to their experts by way of
    ``exchange`` (default: all experts are here). The width of the shared experts is split by
    ``split`` (default: it is not); routed ones are whole, and take the tokens of the stream."""

    def __init__(
        self,
        hidden_size: int,
        config: MoEConfig,
        exchange: TokenExchange | None = None,
        split: TensorSplit | None = None,
    ) -> None:
        super().__init__()
        self.exchange = exchange or AllHere(config.num_experts)
        self.gate = Router(hidden_size, config)
        self.experts = Experts(hidden_size, config, len(self.exchange.experts))
        width = config.num_shared_experts * config.intermediate_size
        self.shared_experts = SwiGLU(hidden_size, width, split) if width else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[..., D] -> [..., D] and the load of this call, int64 [E] tokens per expert."""
        tokens = x.flatten(0, -2)
        weights, experts = self.gate(tokens)
        sent = self.exchange.send(tokens, experts, weights, _compute_dtype(tokens))
        # Meanwhile. In the backward pass too, which runs in the reverse order.
        shared = self.shared_experts(x) if self.shared_experts is not None else None
        y = sent.back(self._routed(sent.arrived())).view_as(x)
        # Handed up and not counted here: a forward pass that is recomputed would count twice.
        return y if shared is None else y + shared, sent.load

    def _routed(self, here: Routed) -> Tensor:
        """The weighted sum over each token's experts here, [M, D] -> [M, D]."""
        row_weights = here.weights.index_select(0, here.pairs.order)
        rows = self.experts(dispatch(here.tokens, here.pairs), row_weights, here.pairs.ends)
        return combine(rows, here.pairs)


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def routers(module: nn.Module) -> list[Router]:
    """The routers of a chunk, in layer order."""
    return [m for m in module.modules() if isinstance(m, Router)]


def router_loads(module: nn.Module) -> list[Tensor]:
    """The ``tokens_per_expert`` of a chunk, for data-parallel ranks to sum in place."""
    return [router.tokens_per_expert for router in routers(module)]


@torch.no_grad()
def update_router_biases(modules: list[nn.Module], rate: float) -> None:
    """After an optimizer step: push the biases toward even load and start counting anew.

    ``b += rate * (s - mean(s))`` with ``s = sign(mean load - load)`` (Moonlight, arXiv 2502.16982,
    appendix C). ``rate`` 0 only resets the counts.
    """
    for router in (router for module in modules for router in routers(module)):
        load = router.tokens_per_expert.to(router.e_score_correction_bias.dtype)
        sign = torch.sign(load.mean() - load)
        # Only differences between biases choose: without their mean they do not drift together.
        router.e_score_correction_bias.add_(rate * (sign - sign.mean()))
        router.tokens_per_expert.zero_()


def moe_flops_per_token(hidden_size: int, config: MoEConfig) -> float:
    """Forward FLOPs per token of router, chosen experts and shared experts."""
    active = config.num_experts_per_token + config.num_shared_experts
    expert = swiglu_flops_per_token(hidden_size, config.intermediate_size)
    return 2 * hidden_size * config.num_experts + active * expert
