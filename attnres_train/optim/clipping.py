"""This rank's part of clipping by the global gradient norm: the sum over ranks is the caller's."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# A long fp32 norm on a CPU is right to three digits at 2e7 elements. Norms of rows of this length,
# summed in fp64, cost the same and are right to nine.
_ROW = 4096


def grad_square_sum(parameters: Iterable[Tensor], device: torch.device | str = "cpu") -> Tensor:
    """Sum of squares of all gradients of ``parameters``: fp64, shape [], on ``device``.

    Gradients that are None count as zero. Deterministic for a given order of parameters.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    for grad in (p.grad for p in parameters if p.grad is not None):
        total += _square_sum(grad.detach()).to(device)
    return total


def _square_sum(grad: Tensor) -> Tensor:
    dtype = torch.promote_types(grad.dtype, torch.float32)
    flat = grad.flatten()
    tail = flat.numel() % _ROW
    rows = (flat[: flat.numel() - tail].view(-1, _ROW), flat[flat.numel() - tail :].view(1, -1))
    norms = [torch.linalg.vector_norm(part, dim=1, dtype=dtype).double() for part in rows]
    return torch.cat(norms).square().sum()


def clip_factor(grad_norm: float, clip_grad: float) -> float:
    """Factor that brings a gradient of norm ``grad_norm`` down to ``clip_grad``; 1 where the norm
    is within the limit or ``clip_grad`` is 0 (no clipping)."""
    return clip_grad / grad_norm if 0 < clip_grad < grad_norm else 1.0


@torch.no_grad()
def scale_grads(parameters: Iterable[Tensor], factor: float | Tensor) -> None:
    """Multiply every gradient by ``factor`` in place."""
    for grad in (p.grad for p in parameters if p.grad is not None):
        grad.mul_(factor)
