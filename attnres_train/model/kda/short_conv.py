"""Short causal depthwise convolution with SiLU, in front of KDA's q, k and v.

Shapes: B batch, T tokens, P channels, k taps.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable

from attnres_train.model.autograd import Context
from attnres_train.model.parameters import ParameterRule, uniform


def short_conv(x: Tensor, weight: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """SiLU of ``y_t = sum_j weight[:, 0, j] * x_{t - k + 1 + j}``; [B, T, P] -> [B, T, P].

    ``weight`` is [P, 1, k], its last tap the current token's. Tokens before the row, and before the
    document when ``cu_seqlens`` [0, ..., B*T] packs several, count as zero. Sums are fp32 (fp64
    stays fp64), the result has the dtype of x. The backward pass keeps x alone.
    """
    gaps: list[Tensor | None] = [None] * weight.shape[-1]
    if cu_seqlens is not None:
        gaps = [_crossing(cu_seqlens, shift) for shift in range(weight.shape[-1])]
    return _ShortConv.apply(x, weight, gaps)


def _crossing(cu_seqlens: Tensor, shift: int) -> Tensor:
    """Flat indices of the tokens that are less than ``shift`` tokens into their document."""
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    tokens = starts[:, None] + torch.arange(shift, device=starts.device)
    # A document of fewer tokens than ``shift`` has none beyond its end.
    return tokens[tokens < ends[:, None]]


def _clear(x: Tensor, tokens: Tensor | None) -> Tensor:
    """x [B, T, P] with zeros at the flat indices ``tokens``."""
    return x if tokens is None else x.flatten(0, 1).index_fill(0, tokens, 0).view_as(x)


def _taps(x: Tensor, weight: Tensor, gaps: list[Tensor | None]) -> list[tuple[Tensor, Tensor]]:
    """(x of earlier tokens, weight [P] of that tap) for shifts 0, 1, ...: in fp32 (fp64)."""
    taps, length = weight.shape[-1], x.shape[1]
    # One padded copy; the taps are views of it, [B, T, P] as it lies (conv1d wants [B, P, T]).
    dtype = torch.promote_types(x.dtype, torch.float32)
    padded, weight = F.pad(x.to(dtype), (0, 0, taps - 1, 0)), weight.to(dtype)
    return [
        (_clear(padded[:, tap : tap + length], gaps[taps - 1 - tap]), weight[:, 0, tap])
        for tap in reversed(range(taps))
    ]


def _convolve(taps: list[tuple[Tensor, Tensor]]) -> Tensor:
    (x, weight), *earlier = taps
    y = x * weight
    for x, weight in earlier:
        y.addcmul_(x, weight)
    return y


class _ShortConvContext(Context, Protocol):
    gaps: list[Tensor | None]


class _ShortConv(Function):
    @staticmethod
    def forward(
        ctx: _ShortConvContext, x: Tensor, weight: Tensor, gaps: list[Tensor | None]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.gaps = gaps
        return F.silu(_convolve(_taps(x, weight, gaps)), inplace=True).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: _ShortConvContext, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        taps = _taps(x, weight, ctx.gaps)
        y = _convolve(taps)
        dy = torch.ops.aten.silu_backward(dy.to(y.dtype), y)
        dweight = torch.stack([(earlier * dy).sum((0, 1)) for earlier, _ in reversed(taps)], dim=-1)
        dx = dy * taps[0][1]
        # Each token gives its gradient to the earlier one it took; what was cleared took none.
        for shift, (_, tap) in enumerate(taps[1:], 1):
            dx[:, :-shift].addcmul_(_clear(dy, ctx.gaps[shift])[:, shift:], tap)
        return dx.to(x.dtype), dweight.unsqueeze(1).to(weight.dtype), None


class ShortConv(nn.Module):
    """`short_conv` with its ``weight`` [channels, 1, taps]."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, taps))
        nn.init.uniform_(self.weight, -(taps**-0.5), taps**-0.5)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        return short_conv(x, self.weight, cu_seqlens)

    def parameter_rules(self, std: float) -> dict[str, ParameterRule]:
        """U(-1, 1) / sqrt(taps), torch's default for such a convolution."""
        return {"weight": ParameterRule(uniform(self.weight.shape[-1] ** -0.5), split=0)}

    def extra_repr(self) -> str:
        return "{}, taps={}".format(*self.weight.shape[::2])
