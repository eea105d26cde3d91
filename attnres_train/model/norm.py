"""Root-mean-square normalisation. Shapes: ``...`` any leading dimensions, d the normalised size, r
the rank of a gate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnres_train.config.model_schema import ModelConfig
from attnres_train.model.parameters import ParameterRule, constant, matrices


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * x / rms(x)`` over the last dimension, [..., d] -> [..., d].

    Statistics are fp32 (fp64 stays fp64); the weight multiplies after the result is back in the
    dtype of ``x``, as in the released Kimi-Linear code.
    """
    # A sum of squares over thousands of elements is beyond bf16, and overflows fp16.
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * F.rms_norm(wide, wide.shape[-1:], eps=eps).to(x.dtype)


class RMSNorm(nn.Module):
    """RMSNorm with a learnable ``weight`` [size], initialised to one."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.gated(rms_norm(x, self.weight, self.eps))

    def gated(self, normed: Tensor) -> Tensor:
        """What follows from ``normed``, the input after norm and weight: here itself."""
        return normed

    def parameter_rules(self, std: float) -> dict[str, ParameterRule]:
        return {"weight": ParameterRule(constant(1.0))}

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


class GatedRMSNorm(RMSNorm):
    """RMSNorm y, and a gate on each of its channels (GatedNorm, arXiv 2601.22966, section 3.4):

        y' = sigmoid(W_up silu(W_down y)) * y

    W_down is ``gate_down`` [r, size], W_up ``gate_up`` [size, r]. The paper gates every norm, here
    it is those of `input_norm`; it does not say how the maps begin: here like other linear maps, so
    that every gate is near 1/2.
    """

    def __init__(self, size: int, eps: float, rank: int) -> None:
        super().__init__(size, eps)
        self.gate_down = nn.Parameter(torch.empty(rank, size))
        self.gate_up = nn.Parameter(torch.empty(size, rank))

    def gated(self, normed: Tensor) -> Tensor:
        hidden = F.silu(F.linear(normed.to(self.gate_down.dtype), self.gate_down))
        return F.linear(hidden, self.gate_up).sigmoid().to(normed.dtype) * normed

    def parameter_rules(self, std: float) -> dict[str, ParameterRule]:
        gates = matrices(std, ("gate_down", "gate_up"), role="low_rank")
        return super().parameter_rules(std) | gates

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={len(self.gate_down)}"


def gate_flops_per_token(size: int, rank: int) -> float:
    """Forward FLOPs per token of the two maps of a `GatedRMSNorm`."""
    return 4.0 * size * rank


def input_norm(model: ModelConfig) -> RMSNorm:
    """The norm of what a sublayer of ``model``, or its output head, reads."""
    rank = model.residual.norm_gate_rank
    if rank is None:
        return RMSNorm(model.hidden_size, model.norm_eps)
    return GatedRMSNorm(model.hidden_size, model.norm_eps, rank)
