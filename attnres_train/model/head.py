"""Cross-entropy of a linear head whose logits never exist as a whole.

Shapes: N tokens, D hidden size, V entries of the vocabulary that are here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from attnres_train.model.autograd import Context
from attnres_train.model.split import Vocabulary, WholeVocabulary

_LOGITS_AT_ONCE = 1 << 27  # elements: 0.5 GiB of fp32 logits, 819 tokens of a 163840 vocabulary


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor,
    logits_at_once: int = _LOGITS_AT_ONCE,
    divisor: Tensor | None = None,
    vocabulary: Vocabulary | None = None,
) -> Tensor:
    """Mean over tokens, weighted by ``mask``, of ``-log softmax(hidden @ weight.T)[label]``.

    ``hidden`` [N, D], ``weight`` [V, D], ``labels`` int64 [N], ``mask`` [N]; a scalar in fp32
    (fp64 stays fp64), 0 when the mask is. ``divisor``, a scalar, takes the place of the mask's sum.
    With gradients off ``mask`` may be [N, G]: G losses [G], each by its column, of one divisor.
    The matmul follows autocast, everything after it is fp32 (fp64). Gradients are computed along
    with the loss, some tokens at a time: nothing is recomputed, and of the logits at most
    ``logits_at_once`` elements exist at any moment.

    Labels count over the whole ``vocabulary`` (default: all of it is here). Where V are some of it
    the loss is that over all, on every rank, while the gradients are of what is here: that of
    ``hidden`` is a part of a sum.
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
    vocabulary = vocabulary or WholeVocabulary(len(weight))
    # Asked for here, as gradients are always off inside an autograd function.
    with_gradient = torch.is_grad_enabled()
    if with_gradient and mask.dim() > 1:
        raise ValueError("several losses at once have no gradients: the mask has to be [N]")
    return _LinearCrossEntropy.apply(
        hidden, weight, labels, share, tokens, with_gradient, vocabulary
    )


class TokenLosses(NamedTuple):
    """Of every token: ``nats``, fp32 (fp64), and ``is_best``, whether its label was the likeliest
    entry of the vocabulary, bool."""

    nats: Tensor
    is_best: Tensor


@torch.no_grad()
def token_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    logits_at_once: int = _LOGITS_AT_ONCE,
    vocabulary: Vocabulary | None = None,
) -> TokenLosses:
    """`linear_cross_entropy` of every token by itself, [N] each, over the whole ``vocabulary``
    (default: V are all of it). No gradients."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    tokens = max(1, logits_at_once // weight.shape[0])
    vocabulary = vocabulary or WholeVocabulary(len(weight))
    first, last = vocabulary.here.start, vocabulary.here.stop - 1
    nats, is_best = [], []
    with torch.autocast(device, enabled=False):
        for x, label in zip(hidden.split(tokens), labels.split(tokens), strict=True):
            logits = F.linear(x, weight).to(wide)
            best, place = logits.max(-1)
            highest = vocabulary.highest(best.clone())
            # The first of the likeliest, wherever they are: as the highest negative number.
            place = torch.where(best == highest, -(place + first), torch.iinfo(place.dtype).min)
            is_best.append(vocabulary.highest(place) == -label)
            logits -= highest.unsqueeze(-1)
            here = label.clamp(first, last)
            own = logits.gather(-1, (here - first).unsqueeze(-1)).squeeze(-1) * (here == label)
            sums = torch.stack([own, logits.exp_().sum(-1)], -1)
            own, total = vocabulary.total(sums).unbind(-1)
            nats.append(total.log() - own)
    return TokenLosses(torch.cat(nats), torch.cat(is_best))


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
        vocabulary: Vocabulary,
    ) -> Tensor:
        grad_hidden = torch.empty_like(hidden) if with_gradient else None
        grad_weight = torch.zeros_like(weight, dtype=share.dtype) if with_gradient else None
        loss = share.new_zeros(share.shape[1:])
        share = share.view(len(share), -1)
        first, last = vocabulary.here.start, vocabulary.here.stop - 1
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), tokens):
                part = slice(start, start + tokens)
                x, label, part_share = hidden[part], labels[part, None], share[part]
                logits = F.linear(x, weight).to(share.dtype)
                logits -= vocabulary.highest(logits.amax(-1, keepdim=True))
                # Of a label that is elsewhere it is 0, which adds nothing there.
                is_here, label = label.clamp(first, last) == label, label.clamp(first, last) - first
                own = logits.gather(-1, label) * is_here  # before they become their exponentials
                sums = torch.cat([own, logits.exp_().sum(-1, keepdim=True)], -1)
                own, total = vocabulary.total(sums).split(1, -1)
                nats = (total.log() - own) * part_share
                loss += nats.sum(0) if loss.dim() else nats.sum()
                if grad_hidden is not None and grad_weight is not None:
                    # (softmax - one-hot label) x share, in the memory of the exponentials.
                    less = -part_share * is_here
                    grad = logits.mul_(part_share / total).scatter_add_(-1, label, less)
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
        return grad_hidden * scale, grad_weight * scale, None, None, None, None, None
