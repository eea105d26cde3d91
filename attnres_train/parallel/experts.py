"""Expert parallelism: tokens travel to the ranks of their experts, and sums travel back.

A token goes once to every rank that has one of its experts, whatever the number of them there, and
that rank's weighted sum comes back once: the least that can be sent. Sizes are exact, nothing is
padded and no token is dropped. They are read on the host, which waits for the device there.

Shapes: N tokens of this rank, D hidden size, K experts per token, E experts; S tokens that this
rank sends (copies of its N), M that it receives, P (token, expert) pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import Function, once_differentiable
from torch.distributed import ProcessGroup

from attnres_train.model.moe.permutation import (
    Ragged,
    RaggedPermutation,
    combine,
    dispatch,
    load_of,
)
from attnres_train.model.ports import Routed, Sent


class ExpertExchange:
    """`model.ports.TokenExchange` over ``group``, whose ranks hold consecutive experts.

    All ranks of the group make the same calls in the same order, whatever number of tokens they
    have. ``bytes_sent`` counts what this rank has sent to others, forward and backward.
    """

    def __init__(self, num_experts: int, group: ProcessGroup) -> None:
        if num_experts % group.size():
            raise ValueError(f"{num_experts} experts cannot be shared by {group.size()} ranks")
        self.group, self.num_experts = group, num_experts
        share = num_experts // group.size()
        self.experts = range(group.rank() * share, (group.rank() + 1) * share)
        self.bytes_sent = 0
        self.overflow: Tensor | int = 0

    def send(self, tokens: Tensor, experts: Tensor, weights: Tensor, dtype: torch.dtype) -> Sent:
        return _Sent(self, tokens, experts, weights, dtype)

    def start(self, tensor: Tensor, sizes: Sizes) -> tuple[Tensor, dist.Work]:
        """Begin to send parts of ``tensor`` [sum of ``sizes.sent``, ...] to the ranks of the group,
        in their order. What is returned is filled once the work has been waited for."""
        tensor = tensor.contiguous()
        out = tensor.new_empty(sum(sizes.received), *tensor.shape[1:])
        received, sent = list(sizes.received), list(sizes.sent)
        work = dist.all_to_all_single(out, tensor, received, sent, group=self.group, async_op=True)
        assert work is not None
        to_others = sum(sent) - sent[self.group.rank()]
        self.bytes_sent += to_others * tensor.shape[1:].numel() * tensor.element_size()
        return out, work


class Sizes(NamedTuple):
    """Elements along the first dimension to and from every rank of the group."""

    sent: Sequence[int]
    received: Sequence[int]

    @property
    def back(self) -> Sizes:
        return Sizes(self.received, self.sent)


class _Sent:
    """One call of the exchange. Everything is under way once it is made."""

    def __init__(
        self,
        exchange: ExpertExchange,
        tokens: Tensor,
        experts: Tensor,
        weights: Tensor,
        dtype: torch.dtype,
    ) -> None:
        self.exchange = exchange
        share, ranks = len(exchange.experts), exchange.group.size()
        expert = experts.flatten()
        # Stable: by rank, then by token, so that the pairs of one copy of a token are adjacent.
        owner, order = (expert // share).sort(stable=True)
        token = order // experts.shape[1]
        is_first = torch.ones_like(owner, dtype=torch.bool)
        is_first[1:] = (owner[1:] != owner[:-1]) | (token[1:] != token[:-1])
        copies, pairs = (
            owner.new_zeros(ranks).scatter_add_(0, owner, one)
            for one in (is_first.long(), torch.ones_like(owner))
        )
        counts = torch.stack([copies, pairs], 1)
        arriving, counted = exchange.start(counts, Sizes([1] * ranks, [1] * ranks))

        self.load = load_of(expert, exchange.num_experts)
        self.copies = Ragged.of(token[is_first], len(tokens))
        rows = dispatch(tokens.to(dtype), self.copies)
        counted.wait()
        (copies_to, pairs_to), (copies_from, pairs_from) = counts.T.tolist(), arriving.T.tolist()
        self.tokens = Sizes(copies_to, copies_from)
        of_pairs = Sizes(pairs_to, pairs_from)
        # Which expert of its rank, and whether another token begins, in one number.
        told = (expert[order] % share * 2 + is_first).int()
        self.told, self.told_work = exchange.start(told, of_pairs)
        self.journey = Journey(exchange, self.tokens, of_pairs)
        self.journey.depart(rows, weights.flatten().index_select(0, order))

    def arrived(self) -> Routed:
        tokens, weights = self.journey.land()
        self.told_work.wait()
        token = (self.told % 2).cumsum(0) - 1
        expert = (self.told // 2).long()
        share = len(self.exchange.experts)
        return Routed(tokens, weights, RaggedPermutation.sort(token, expert, len(tokens), share))

    def back(self, sums: Tensor) -> Tensor:
        journey = Journey(self.exchange, self.tokens.back)
        journey.depart(sums)
        (rows,) = journey.land()
        return combine(rows, self.copies)


class Journey:
    """Differentiable: tensors go in the forward pass, their gradients return in the backward pass.
    Between `depart` and `land`, and between the backward passes of the two, others are computed."""

    def __init__(self, exchange: ExpertExchange, *sizes: Sizes) -> None:
        self.flights = _Flight(exchange, sizes), _Flight(exchange, [one.back for one in sizes])
        self.under_way: tuple[Tensor, ...] = ()

    def depart(self, *tensors: Tensor) -> None:
        self.under_way = _Depart.apply(*self.flights, *tensors)

    def land(self) -> tuple[Tensor, ...]:
        return _Land.apply(*self.flights, *self.under_way)


class _Flight:
    """Tensors that travel together in one direction."""

    def __init__(self, exchange: ExpertExchange, sizes: Sequence[Sizes]) -> None:
        self.exchange, self.sizes = exchange, sizes
        self.started: list[tuple[Tensor, dist.Work]] = []

    def start(self, tensors: Sequence[Tensor]) -> None:
        assert not self.started
        self.started = [self.exchange.start(*one) for one in zip(tensors, self.sizes, strict=True)]

    def wait(self) -> tuple[Tensor, ...]:
        """What has arrived."""
        for _, work in self.started:
            work.wait()
        arrived = tuple(tensor for tensor, _ in self.started)
        self.started = []
        return arrived


class _FlightContext(Protocol):
    back: _Flight
    """The flight of the gradients."""


class _Depart(Function):
    """Begins to send. Its backward pass waits for the gradients, which `_Land`'s begins to send.

    What it returns stands for what is under way, and is the edge from the one to the other.
    """

    @staticmethod
    def forward(
        ctx: _FlightContext, flight: _Flight, back: _Flight, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.back = back
        flight.start(tensors)
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: _FlightContext, *_: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *ctx.back.wait())


class _Land(Function):
    """Waits for what `_Depart` has sent."""

    @staticmethod
    def forward(
        ctx: _FlightContext, flight: _Flight, back: _Flight, *under_way: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.back = back
        return flight.wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: _FlightContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.back.start(grads)
        return (None, None, *(tensor for tensor, _ in ctx.back.started))
