"""SwiGLU feed-forward. Shapes: B samples, S tokens of the stream, D hidden size, F intermediate
size."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from attnres_train.model.parameters import ParameterRule, matrices
from attnres_train.model.split import TensorSplit, Whole


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))`` without biases, [B, S, D] -> [B, S, D]; its width is split
    by ``split`` (default: it is not)."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, split: TensorSplit | None = None
    ) -> None:
        super().__init__()
        self.split = split = split or Whole()
        self.gate_proj = split.column(hidden_size, intermediate_size)
        self.up_proj = split.column(hidden_size, intermediate_size)
        self.down_proj = split.row(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.split.gather(x)
        return self.split.scatter(self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)))

    def parameter_rules(self, std: float) -> dict[str, ParameterRule]:
        rules = matrices(std, ("gate_proj.weight", "up_proj.weight"), split=0)
        return rules | matrices(std, ["down_proj.weight"], split=1)


def swiglu_flops_per_token(hidden_size: int, intermediate_size: int) -> float:
    """Forward FLOPs per token of the three projections."""
    return 6 * hidden_size * intermediate_size
