"""Expert parallelism with static shapes: the host reads nothing, and so never waits for the device.

Every rank sends every other one as many rows as there is room for, filled or not, and computes as
many pairs. What finds no room is counted, and makes the loss NaN: the step is passed over, and no
token is dropped in silence.

Shapes: N tokens of this rank, D hidden size, K experts per token, E experts, R ranks with E / R of
them; C rows from one rank to another, S = min(K, E / R) pairs in a row; M = R C rows that come
here, P pairs that are computed here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from attnres_train.config.model_schema import MoEConfig
from attnres_train.model.moe.permutation import combine, dispatch, load_of
from attnres_train.model.ports import Routed, Sent
from attnres_train.parallel.experts import ExpertExchange, Journey, Sizes


class BoundedExchange(ExpertExchange):
    """`model.ports.TokenExchange` over ``group``, whose ranks have as many tokens each.

    ``factor`` (at least 1) times what comes where the experts' load is even is the room that there
    is. Without gradients (validation) the exact exchange is taken.
    """

    def __init__(self, config: MoEConfig, group: ProcessGroup, factor: float) -> None:
        super().__init__(config.num_experts, group)
        self.config, self.factor = config, factor

    def send(self, tokens: Tensor, experts: Tensor, weights: Tensor, dtype: torch.dtype) -> Sent:
        if not torch.is_grad_enabled():
            return super().send(tokens, experts, weights, dtype)
        return _Sent(self, tokens, experts, weights, dtype)

    def room(self, tokens: int, choices: int) -> tuple[int, int]:
        """C and P for N ``tokens`` with K ``choices`` each."""
        ranks, share = self.group.size(), len(self.experts)
        rows = min(tokens, math.ceil(self.factor * tokens * self.config.reached(ranks)))
        at_most = ranks * rows * min(choices, share)
        return rows, min(at_most, math.ceil(self.factor * tokens * choices))


class _Sent:
    """One call of the exchange. Everything is under way once it is made."""

    def __init__(
        self,
        exchange: BoundedExchange,
        tokens: Tensor,
        experts: Tensor,
        weights: Tensor,
        dtype: torch.dtype,
    ) -> None:
        self.exchange = exchange
        (count, choices), share = experts.shape, len(exchange.experts)
        ranks, pairs_of_row = exchange.group.size(), min(choices, share)
        rows, self.pairs = exchange.room(count, choices)
        self.load = load_of(experts, exchange.num_experts)
        rank = experts // share
        there = torch.zeros(count, ranks, dtype=torch.bool, device=tokens.device)
        there = there.scatter(1, rank, True)
        slot = there.cumsum(0) - 1  # [N, R], the token's place among those that go there
        overflow = (there & (slot >= rows)).sum()
        # Of each pair: its token's row, and how many pairs of the row come before it.
        slot_of_pair = slot.gather(1, rank)
        row = torch.where(slot_of_pair < rows, rank * rows + slot_of_pair, ranks * rows)
        before = (rank[:, :, None] == rank[:, None, :]).tril(-1).sum(-1)
        first = torch.where(before == 0, row, ranks * rows)
        nowhere = ranks * rows * pairs_of_row
        place = torch.where(row < ranks * rows, row * pairs_of_row + before, nowhere)

        self.copies = Slots.of(first, ranks * rows)
        of_pairs = Slots.of(place.view(-1, 1), nowhere)
        told = (experts % share).flatten().index_select(0, of_pairs.token)
        told = told.masked_fill(~of_pairs.filled, share).int().view(-1, pairs_of_row)
        sent_weights = dispatch(weights.reshape(-1, 1), of_pairs).view(-1, pairs_of_row)
        sent_weights = sent_weights.masked_fill(told == share, 0) + _nan_if(overflow, weights)
        sizes = Sizes([rows] * ranks, [rows] * ranks)
        exchange.overflow = exchange.overflow + overflow
        self.told, self.told_work = exchange.start(told, sizes)
        self.journey = Journey(exchange, sizes, sizes)
        self.journey.depart(dispatch(tokens.to(dtype), self.copies), sent_weights)
        self.back_sizes = sizes.back

    def arrived(self) -> Routed:
        tokens, weights = self.journey.land()
        self.told_work.wait()
        share = len(self.exchange.experts)
        pairs, overflow = SlottedPairs.sort(self.told.long(), share, self.pairs)
        self.exchange.overflow = self.exchange.overflow + overflow
        weights = weights + _nan_if(overflow, weights)
        return Routed(tokens, weights.flatten(), pairs)

    def back(self, sums: Tensor) -> Tensor:
        journey = Journey(self.exchange, self.back_sizes)
        journey.depart(sums)
        (rows,) = journey.land()
        return combine(rows, self.copies)


def _nan_if(overflow: Tensor, like: Tensor) -> Tensor:
    """A scalar, 0 or NaN, in the dtype of ``like``."""
    return torch.where(overflow > 0, torch.nan, 0.0).to(like.dtype)


@dataclass(frozen=True)
class Slots:
    """Copies (`permutation.Copies`) in a fixed number of rows, of which some are empty.

    ``token`` int64 [rows]: of an empty row it is 0. ``filled`` bool [rows]. ``rows`` int64 [N, J]:
    the rows with copies of a token, or how many rows there are where it has fewer.
    """

    token: Tensor
    filled: Tensor
    rows: Tensor

    @classmethod
    def of(cls, rows: Tensor, num_rows: int) -> Slots:
        """From the rows of every token; none twice but ``num_rows``, which is no row."""
        source = torch.arange(len(rows), device=rows.device)[:, None].expand_as(rows)
        token = rows.new_full((num_rows + 1,), -1)
        token = token.scatter(0, rows.flatten(), source.flatten())[:num_rows]
        return cls(token.clamp(min=0), token >= 0, rows)

    def collect(self, rows: Tensor) -> Tensor:
        """[rows, D] -> [N, D], the sum over each token's rows, whatever is in empty ones."""
        wide = torch.promote_types(rows.dtype, torch.float32)
        total = rows.new_zeros(len(self.rows), rows.shape[-1], dtype=wide)
        for mine in self.rows.unbind(1):
            there = (mine < len(rows)).unsqueeze(-1)
            total += rows.index_select(0, mine.clamp(max=len(rows) - 1)).where(there, 0)
        return total.to(rows.dtype)


@dataclass(frozen=True)
class SlottedPairs:
    """P pairs sorted by expert (`model.ports.SortedPairs`); those after the last of ``ends`` are
    none, and what is computed of them is not read."""

    order: Tensor
    copies: Slots
    ends: Tensor

    @classmethod
    def sort(cls, told: Tensor, experts: int, num_pairs: int) -> tuple[SlottedPairs, Tensor]:
        """From the expert of each pair of a row, int64 [M, S] (``experts``: of none). Also returns
        how many pairs did not find room, int64 []."""
        sorted_experts, order = told.flatten().sort(stable=True)
        wanted = torch.arange(experts, device=told.device)
        ends = torch.searchsorted(sorted_experts, wanted, right=True)
        order = order[:num_pairs]
        place = order.new_full((told.numel(),), num_pairs)
        place = place.scatter(0, order, torch.arange(len(order), device=order.device))
        place = place.masked_fill(told.flatten() == experts, num_pairs).view(told.shape)
        copies = Slots(order // told.shape[1], sorted_experts[:num_pairs] < experts, place)
        overflow = (ends[-1] - num_pairs).clamp(min=0)
        return cls(order, copies, ends.clamp(max=num_pairs).int()), overflow

    @property
    def token(self) -> Tensor:
        return self.copies.token

    def collect(self, rows: Tensor) -> Tensor:
        return self.copies.collect(rows)
