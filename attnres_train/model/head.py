"""Cross-entropy of a linear head whose logits never exist as a whole.

Shapes: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from attnres_train.model.autograd import Context

_LOGITS_AT_ONCE = 1 << 27  # elements: 0.5 GiB of fp32 logits, 819 tokens of a 163840 vocabulary


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor,
    logits_at_once: int = _LOGITS_AT_ONCE,
    divisor: Tensor | None = None,
) -> Tensor:
    """Mean over tokens, weighted by ``mask``, of ``-log softmax(hidden @ weight.T)[label]``.

    ``hidden`` [N, D], ``weight`` [V, D], ``labels`` int64 [N], ``mask`` [N]; a scalar in fp32
    (fp64 stays fp64), 0 when the mask is. ``divisor``, a scalar, takes the place of the mask's sum.
    The matmul follows autocast, everything after it is fp32 (fp64). Gradients are computed along
    with the loss, some tokens at a time: nothing is recomputed, and of the logits at most
    ``logits_at_once`` elements exist at any moment.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    mask = mask.to(torch.promote_types(hidden.dtype, torch.float32))
    divisor = mask.sum() if divisor is None else divisor.to(mask.dtype)
    # Where nothing is counted the mask is 0 and the divisor may be: 0 / tiny and not 0 / 0.
    share = mask / divisor.clamp_min(torch.finfo(mask.dtype).tiny)
    tokens = max(1, logits_at_once // weight.shape[0])
    # Asked for here, as gradients are always off inside an autograd function.
    return _LinearCrossEntropy.apply(hidden, weight, labels, share, tokens, torch.is_grad_enabled())


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Context,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        share: Tensor,
        tokens: int,
        with_gradient: bool,
    ) -> Tensor:
        grad_hidden = torch.empty_like(hidden) if with_gradient else None
        grad_weight = torch.zeros_like(weight, dtype=share.dtype) if with_gradient else None
        loss = share.new_zeros(())
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), tokens):
                part = slice(start, start + tokens)
                x, label, part_share = hidden[part], labels[part, None], share[part, None]
                logits = F.linear(x, weight).to(share.dtype)
                logits -= logits.amax(-1, keepdim=True)
                own = logits.gather(-1, label)  # before the logits become their exponentials
                total = logits.exp_().sum(-1, keepdim=True)
                loss += ((total.log() - own) * part_share).sum()
                if grad_hidden is not None and grad_weight is not None:
                    # (softmax - one-hot label) x share, in the memory of the exponentials.
                    grad = logits.mul_(part_share / total).scatter_add_(-1, label, -part_share)
                    grad = grad.to(hidden.dtype)
                    torch.mm(grad, weight, out=grad_hidden[part])
                    grad_weight += grad.t() @ x
        if grad_hidden is not None and grad_weight is not None:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        # The loss is a scalar: whatever follows it only scales what was computed along with it.
        scale = grad.to(grad_hidden.dtype)
        return grad_hidden * scale, grad_weight * scale, None, None, None, None
