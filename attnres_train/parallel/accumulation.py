"""Linear maps whose weight's gradient is added up in fp32 by the product that makes it: NVIDIA
apex's fused gradient accumulation. Never run on a GPU, and not measured.

Else a product in the dtype of the parameters is written, made fp32 and added to the gradient of the
micro-batches before, 20 bytes of memory traffic per weight; here it is 8. No product is rounded to
16 bits, so that sums differ from torch's in the last digits.

Shapes: N tokens, I and O features in and out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable

from attnres_train.model.autograd import Context
from attnres_train.model.split import MakeLinear

Accumulate = Callable[[Tensor, Tensor, Tensor], None]
"""(rows [N, I], gradients [N, O], total [O, I]): adds gradients^T rows to the total, in place. The
former two are contiguous, of one 16-bit dtype; the total is fp32."""


def apex_accumulation() -> Accumulate:
    """apex's. Raises ImportError where apex is not installed, or without this extension."""
    from fused_weight_gradient_mlp_cuda import wgrad_gemm_accum_fp32

    accumulate: Accumulate = wgrad_gemm_accum_fp32
    return accumulate


def accumulating_maps(accumulate: Accumulate) -> MakeLinear:
    """Makes torch's linear maps, with gradients added up by ``accumulate``."""
    return lambda features_in, features_out: AccumulatingLinear(
        features_in, features_out, accumulate
    )


class AccumulatingLinear(nn.Linear):
    """torch's, without bias; the weight's ``grad_dtype`` must be fp32, as a chunk makes it. A
    backward pass adds to its ``.grad`` (one of `torch.autograd.grad` too) and then calls its
    hooks, as without this."""

    def __init__(self, features_in: int, features_out: int, accumulate: Accumulate) -> None:
        super().__init__(features_in, features_out, bias=False)
        self.accumulate = accumulate

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Accumulated.apply(x, self.weight, self.accumulate)
        return y


class _AccumulatedContext(Context, Protocol):
    parameter: Tensor
    accumulate: Accumulate
    needs_input_grad: tuple[bool, ...]


class _Accumulated(Function):
    @staticmethod
    def forward(
        ctx: _AccumulatedContext, x: Tensor, weight: Tensor, accumulate: Accumulate
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        # What is saved comes back from a recomputed pass as another tensor, without its gradient.
        ctx.parameter, ctx.accumulate = weight, accumulate
        return F.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: _AccumulatedContext, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        rows, grads = (tensor.flatten(0, -2).contiguous() for tensor in (x, grad))
        grad_x = (grads @ weight).view(x.shape) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None
        if ctx.parameter.grad is None:
            ctx.parameter.grad = torch.zeros_like(weight, dtype=torch.float32)
        ctx.accumulate(rows, grads, ctx.parameter.grad)
        return grad_x, _nothing(ctx.parameter.grad), None


def _nothing(total: Tensor) -> Tensor:
    """A gradient of no entries: autograd adds nothing, and then calls the hooks of the parameter,
    which it would not for None."""
    indices = torch.empty(total.dim(), 0, dtype=torch.int64, device=total.device)
    values = total.new_empty(0)
    return torch.sparse_coo_tensor(indices, values, total.shape, check_invariants=False)
