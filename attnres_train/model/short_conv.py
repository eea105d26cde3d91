"""Short causal depthwise convolution with SiLU, in front of KDA's q, k and v.

Shapes: B batch, T tokens, P channels, k taps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable


def short_conv(x: Tensor, weight: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """SiLU of ``y_t = sum_j weight[:, 0, j] * x_{t - k + 1 + j}``; [B, T, P] -> [B, T, P].

    ``weight`` is [P, 1, k], its last tap the current token's. Tokens before the row, and before the
    document when ``cu_seqlens`` [0, ..., B*T] packs several, count as zero. The backward pass keeps
    x alone.
    """
    taps = weight.shape[-1]
    gaps = None
    if cu_seqlens is not None:
        gaps = [_crossing(cu_seqlens, shift) for shift in range(taps)]
    return _ShortConv.apply(x, weight, gaps)


def _crossing(cu_seqlens: Tensor, shift: int) -> Tensor:
    """Flat indices of the tokens that are less than ``shift`` tokens into their document."""
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    tokens = starts[:, None] + torch.arange(shift, device=starts.device)
    return tokens[tokens < ends[:, None]]


def _shifted(x: Tensor, shift: int, gaps: list[Tensor] | None) -> Tensor:
    """x of ``shift`` tokens earlier [B, T, P], zero where that is another document."""
    if shift == 0:
        return x
    x = F.pad(x, (0, 0, shift, 0))[:, : x.shape[1]]
    if gaps is not None:
        x = x.flatten(0, 1).index_fill(0, gaps[shift], 0).view_as(x)
    return x


def _shifted_back(dy: Tensor, shift: int, gaps: list[Tensor] | None) -> Tensor:
    """Adjoint of `_shifted`."""
    if shift == 0:
        return dy
    if gaps is not None:
        dy = dy.flatten(0, 1).index_fill(0, gaps[shift], 0).view_as(dy)
    return F.pad(dy, (0, 0, 0, shift))[:, shift:]


def _convolve(x: Tensor, weight: Tensor, gaps: list[Tensor] | None) -> Tensor:
    taps = weight.shape[-1]
    y = x * weight[:, 0, -1]
    for shift in range(1, taps):
        y.addcmul_(_shifted(x, shift, gaps), weight[:, 0, taps - 1 - shift])
    return y


class _ShortConv(Function):
    @staticmethod
    def forward(ctx, x, weight, gaps):
        ctx.save_for_backward(x, weight)
        ctx.gaps = gaps
        return F.silu(_convolve(x, weight, gaps), inplace=True)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        taps = weight.shape[-1]
        y = _convolve(x, weight, ctx.gaps)
        dy = torch.ops.aten.silu_backward(dy, y)
        dx, dweight = torch.zeros_like(x), torch.empty_like(weight)
        for shift in range(taps):
            tap = taps - 1 - shift
            dweight[:, 0, tap] = (_shifted(x, shift, ctx.gaps) * dy).sum((0, 1))
            dx.addcmul_(_shifted_back(dy, shift, ctx.gaps), weight[:, 0, tap])
        return dx, dweight, None


class ShortConv(nn.Module):
    """`short_conv` with its ``weight`` [channels, 1, taps]."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, taps))
        nn.init.uniform_(self.weight, -(taps**-0.5), taps**-0.5)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        return short_conv(x, self.weight, cu_seqlens)

    def extra_repr(self) -> str:
        return "{}, taps={}".format(*self.weight.shape[::2])
