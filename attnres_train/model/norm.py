"""Root-mean-square normalisation. Shapes: ``...`` any leading dimensions, d the normalised size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnres_train.model.parameters import ParameterRule, constant


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
        return rms_norm(x, self.weight, self.eps)

    def parameter_rules(self, std: float) -> dict[str, ParameterRule]:
        return {"weight": ParameterRule(constant(1.0))}

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"
