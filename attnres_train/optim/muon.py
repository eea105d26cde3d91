"""Muon: momentum whose matrices are orthogonalised (arXiv 2502.16982, Moonlight).

Shapes: A rows, B columns of a matrix, [a, b] of the part of it that is here; N matrices of one
shape in a batch, M of which are made whole here; E experts of a stack.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnres_train.config.schema import OptimizerConfig
from attnres_train.optim.ports import AllHere, MatrixExchange, Sent

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_NS_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}

# Newton-Schulz wants few large launches on a GPU; on a CPU, batches beyond its cache cost a third.
_GPU_BATCH, _CPU_BATCH = 2**26, 2**18


def newton_schulz(g_NAB: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Approximately orthogonalise each matrix of [N, A, B]; the result has dtype ``dtype``.

    X0 = G / (|G|_F + 1e-7); X <- a X + (b S + c S^2) X with S = X X^T, ``steps`` times: singular
    values end near 1 (0.7 to 1.2). The norm is taken in the dtype of the input, the iteration runs
    in ``dtype``, on the transpose where that makes S smaller. A zero matrix stays zero.
    """
    a, b, c = NS_COEFFICIENTS
    norm = torch.linalg.matrix_norm(g_NAB, keepdim=True)
    x = (g_NAB / (norm + 1e-7)).to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT.contiguous() if tall else x
    for _ in range(steps):
        s = x @ x.mT
        s = torch.baddbmm(s, s, s, beta=b, alpha=c)
        x = torch.baddbmm(x, s, x, beta=a)
    return x.mT if tall else x


class _Piece(NamedTuple):
    """Views of the same matrices [n, a, b] of one parameter."""

    weight: Tensor
    grad: Tensor
    momentum: Tensor


class Muon(torch.optim.Optimizer):
    """Muon over matrices [A, B] and stacks of matrices [E, A, B], each matrix on its own:

        M <- momentum M + G                              (momentum buffer, dtype of the parameter)
        O <- newton_schulz(G + momentum M)               (Nesterov)
        W <- W - lr (0.2 sqrt(max(A, B)) O + weight_decay W)

    The factor gives updates the RMS of AdamW's (about 0.2 lr), so both share one learning rate
    (arXiv 2502.16982, Eq. 4). All parameters of one shape are orthogonalised together in batches of
    at most ``max_batch_elements`` elements. ``heads`` of more than 1: each parameter is a map to so
    many heads, [heads x A, B], of which each is a matrix. ``split``: parameters are parts of
    matrices, cut along this axis (-2 or -1), which ``exchange`` makes whole for Newton-Schulz; all
    else is elementwise. Every parameter must have a gradient. State, created at once:
    ``momentum_buffer``.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        ns_steps: int = 5,
        ns_dtype: torch.dtype = torch.bfloat16,
        max_batch_elements: int = 2**26,
        heads: int = 1,
        split: int | None = None,
        exchange: MatrixExchange | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.ns_steps = ns_steps
        self.ns_dtype = ns_dtype
        self.max_batch_elements = max_batch_elements
        self.heads, self.split = heads, -2 if split is None else split
        self.exchange = AllHere() if split is None or exchange is None else exchange
        for param in (param for group in self.param_groups for param in group["params"]):
            if param.ndim not in (2, 3) or param.shape[-2] % heads:
                raise ValueError(f"Muon updates matrices, not a shape of {tuple(param.shape)}")
            self.state[param]["momentum_buffer"] = torch.zeros_like(param)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One update. A closure is not called: gradients are there."""
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["momentum_buffer"].mul_(group["momentum"]).add_(param.grad)
            # Where matrices travel, a batch does while the one before it is orthogonalised.
            ahead, sent = int(self.exchange.size > 1), deque[tuple[list[_Piece], Sent]]()
            for batch in self._batches(group["params"]):
                sent.append((batch, self._send(batch, group)))
                if len(sent) > ahead:
                    self._update(*sent.popleft(), group)
            for batch, under_way in sent:
                self._update(batch, under_way, group)

    def _batches(self, params: list[Tensor]) -> Iterator[list[_Piece]]:
        """Pieces of equal matrix shape in the order of ``params``; long stacks are split."""
        by_shape: dict[tuple[int, int], list[Tensor]] = {}
        for param in params:
            by_shape.setdefault(self._matrix(param), []).append(param)
        for shape, same in by_shape.items():
            # At least a matrix for each of those that share them.
            room = capacity = max(self.exchange.size, self.max_batch_elements // math.prod(shape))
            batch: list[_Piece] = []
            for piece in (piece for param in same for piece in self._pieces(param, capacity)):
                if len(piece.weight) > room:
                    yield batch
                    batch, room = [], capacity
                batch.append(piece)
                room -= len(piece.weight)
            yield batch

    def _matrix(self, param: Tensor) -> tuple[int, int]:
        """The shape, or that of its part, of what is orthogonalised by itself."""
        return param.shape[-2] // self.heads, param.shape[-1]

    def _pieces(self, param: Tensor, matrices: int) -> Iterator[_Piece]:
        assert param.grad is not None
        tensors = (param, param.grad, self.state[param]["momentum_buffer"])
        stacks = (tensor.view(-1, *self._matrix(param)).split(matrices) for tensor in tensors)
        return map(_Piece._make, zip(*stacks, strict=True))

    def _send(self, batch: list[_Piece], group: dict) -> Sent:
        momentum = group["momentum"]
        nesterov_Nab = torch.cat([p.grad.add(p.momentum, alpha=momentum) for p in batch])
        return self.exchange.send(nesterov_Nab, self.split)

    def _update(self, batch: list[_Piece], sent: Sent, group: dict) -> None:
        wholes_MAB = sent.wholes()
        scale = 0.2 * math.sqrt(max(wholes_MAB.shape[-2:]))
        update_Nab = sent.back(newton_schulz(wholes_MAB, self.ns_steps, self.ns_dtype))
        parts = update_Nab.split([len(piece.weight) for piece in batch])
        lr = group["lr"]
        for piece, part in zip(batch, parts, strict=True):
            piece.weight.mul_(1 - lr * group["weight_decay"]).add_(part, alpha=-lr * scale)


def make_muon(
    params: list[Tensor],
    weight_decay: float,
    config: OptimizerConfig,
    device: torch.device | str,
    heads: int = 1,
    split: int | None = None,
    exchange: MatrixExchange | None = None,
) -> Muon:
    """Muon over ``params`` with the options of a configuration."""
    is_cuda = torch.device(device).type == "cuda"
    auto = "bf16" if is_cuda else "fp32"
    return Muon(
        params,
        config.lr,
        momentum=config.momentum,
        weight_decay=weight_decay,
        ns_steps=config.ns_steps,
        ns_dtype=_NS_DTYPES[auto if config.ns_dtype == "auto" else config.ns_dtype],
        max_batch_elements=_GPU_BATCH if is_cuda else _CPU_BATCH,
        heads=heads,
        split=split,
        exchange=exchange,
    )
