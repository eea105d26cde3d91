"""SwiGLU feed-forward. Shapes: D hidden size, F intermediate size."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from attnres_train.model.parameters import ParameterRule, matrices


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))`` without biases, [..., D] -> [..., D]."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    def parameter_rules(self, std: float) -> dict[str, ParameterRule]:
        return matrices(std, (f"{x}_proj.weight" for x in ("gate", "up", "down")))


def swiglu_flops_per_token(hidden_size: int, intermediate_size: int) -> float:
    """Forward FLOPs per token of the three projections."""
    return 6 * hidden_size * intermediate_size
