"""Copying tokens to where they are needed and summing what comes back, without atomic adds: results
repeat bit for bit.

Shapes: N tokens, D hidden size, K experts per token, E experts. A copy of a token is a row: of a
(token, expert) pair here, or for another rank (`parallel.experts`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import Function


class Copies(Protocol):
    """Which token each row is a copy of: ``token`` int64 [rows]."""

    @property
    def token(self) -> Tensor: ...

    def collect(self, rows: Tensor) -> Tensor:
        """[rows, D] -> [N, D], the sum over each token's rows."""
        ...


@dataclass(frozen=True)
class Permutation:
    """How (token, expert) pairs are sorted by expert, where every token has K of them.

    ``order`` int64 [rows]: pair (token * K + choice) at each sorted row; ``inverse`` its inverse;
    ``token`` int64 [rows]: the row's token; ``ends`` int32 [E]: end of each expert's rows.
    """

    order: Tensor
    inverse: Tensor
    token: Tensor
    ends: Tensor
    experts_per_token: int

    @classmethod
    def sort(cls, experts: Tensor, num_experts: int) -> Permutation:
        """From the chosen expert of every pair, int64 [N, K]."""
        order, ends = _by_expert(experts.flatten(), num_experts)
        # Every index once, so that writing to them has no order to depend on.
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel(), device=order.device)
        return cls(order, inverse, order // experts.shape[1], ends, experts.shape[1])

    @property
    def load(self) -> Tensor:
        """Tokens per expert, int64 [E]."""
        return self.ends.diff(prepend=self.ends.new_zeros(1)).long()

    def collect(self, rows: Tensor) -> Tensor:
        by_token = rows.index_select(0, self.inverse)
        return by_token.view(-1, self.experts_per_token, rows.shape[-1]).sum(1)


@dataclass(frozen=True)
class Ragged:
    """Copies of which every token has a number of its own.

    ``slots``: the tokens with an (i + 1)-th row, int64, and where that is, int64, for each i.
    """

    token: Tensor
    slots: tuple[tuple[Tensor, Tensor], ...]
    num_tokens: int

    @classmethod
    def of(cls, token: Tensor, num_tokens: int) -> Ragged:
        """From the token of each row, int64 [rows]. Reads sizes on the host."""
        order = token.sort(stable=True).indices
        ends = torch.searchsorted(
            token[order], torch.arange(num_tokens, device=token.device), right=True
        )
        starts = torch.cat([ends.new_zeros(1), ends])[:-1]
        most = int((ends - starts).max()) if num_tokens else 0
        slots = []
        for slot in range(most):
            having = (ends - starts > slot).nonzero().flatten()
            slots.append((having, order[starts[having] + slot]))
        return cls(token, tuple(slots), num_tokens)

    def collect(self, rows: Tensor) -> Tensor:
        wide = torch.promote_types(rows.dtype, torch.float32)
        total = rows.new_zeros(self.num_tokens, rows.shape[-1], dtype=wide)
        for having, where in self.slots:  # every token at most once: the order of adding is fixed
            total.index_add_(0, having, rows.index_select(0, where).to(wide))
        return total.to(rows.dtype)


@dataclass(frozen=True)
class RaggedPermutation:
    """As `Permutation`, of tokens of which only some experts are here: ``order`` int64 [rows] is
    the pair at each sorted row, in the order in which the pairs were given."""

    order: Tensor
    copies: Ragged
    ends: Tensor

    @classmethod
    def sort(
        cls, token: Tensor, experts: Tensor, num_tokens: int, num_experts: int
    ) -> RaggedPermutation:
        """From token and expert of every pair, int64 [pairs] each."""
        order, ends = _by_expert(experts, num_experts)
        return cls(order, Ragged.of(token[order], num_tokens), ends)

    @property
    def token(self) -> Tensor:
        return self.copies.token

    def collect(self, rows: Tensor) -> Tensor:
        return self.copies.collect(rows)


def load_of(experts: Tensor, num_experts: int) -> Tensor:
    """Tokens per expert, int64 [E], from the chosen expert of every pair, int64 of any shape."""
    chosen = experts.flatten()
    return chosen.new_zeros(num_experts).scatter_add_(0, chosen, torch.ones_like(chosen))


def _by_expert(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Order and the end of each expert's pairs, from the expert of each pair."""
    # Stable: an expert's rows are in the order of the tokens, and so are the sums over them.
    sorted_experts, order = experts.sort(stable=True)
    wanted = torch.arange(num_experts, device=order.device)
    ends = torch.searchsorted(sorted_experts, wanted, right=True).int()
    return order, ends


class _CopiesContext(Protocol):
    copies: Copies


class _Dispatch(Function):
    """Copies tokens to their rows. Its adjoint is a gather and a short sum, which autograd would do
    as a scatter-add."""

    @staticmethod
    def forward(ctx: _CopiesContext, x: Tensor, copies: Copies) -> Tensor:
        ctx.copies = copies
        return x.index_select(0, copies.token)

    @staticmethod
    def backward(ctx: _CopiesContext, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.copies.collect(grad), None


class _Combine(Function):
    """Sums the rows of each token; the adjoint of `_Dispatch`."""

    @staticmethod
    def forward(ctx: _CopiesContext, rows: Tensor, copies: Copies) -> Tensor:
        ctx.copies = copies
        return copies.collect(rows)

    @staticmethod
    def backward(ctx: _CopiesContext, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.copies.token), None


def dispatch(x: Tensor, copies: Copies) -> Tensor:
    """[N, D] -> [rows, D], a copy of each row's token."""
    return _Dispatch.apply(x, copies)


def combine(rows: Tensor, copies: Copies) -> Tensor:
    """[rows, D] -> [N, D], the sum over each token's rows."""
    return _Combine.apply(rows, copies)
