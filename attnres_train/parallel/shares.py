"""What ranks that share samples send each other, each with the way of its gradients.

Shapes: C ranks, B samples, S = 2 shares of t tokens here of 2C; H heads, K key size, V value size;
P channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import Function, once_differentiable
from torch.distributed import ProcessGroup

from attnres_train.model.autograd import Context
from attnres_train.model.shares import Shares


class ShareGroup:
    """The ranks of ``group``, of which rank r of C has the shares r and 2C - 1 - r of a sample."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        rank, ranks = group.rank(), group.size()
        count = 2 * ranks
        self.shares = Shares(count, (rank, count - 1 - rank))
        self.bytes_sent = 0
        # (rank, own share's place) of every neighbour of an own share, by rank. No rank is a
        # neighbour twice.
        places = list(enumerate(self.shares.own))
        self.next = sorted((self.owner(s + 1), i) for i, s in places if s + 1 < count)
        self.previous = sorted((self.owner(s - 1), i) for i, s in places if s > 0)

    def owner(self, share: int) -> int:
        return min(share, self.shares.count - 1 - share)

    def gather(self, own: Tensor) -> Tensor:
        """[B, S, ...] of every rank, in the order of shares: [B, 2C, ...]."""
        own, ranks = own.contiguous(), self.group.size()
        gathered = own.new_empty(ranks, *own.shape)
        dist.all_gather(list(gathered), own, group=self.group)
        self._count(own, ranks - 1)
        first, second = gathered.unbind(2)
        return torch.cat((first, second.flip(0))).movedim(0, 1)

    def sum(self, shares: Tensor) -> Tensor:
        """From [B, 2C, ...] of every rank the sum, by rank, of what this one has: [B, S, ...]."""
        ranks = self.group.size()
        first, second = shares.movedim(1, 0).split(ranks)
        sent = torch.stack((first, second.flip(0)), dim=2)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        self._count(sent[0], ranks - 1)
        wide = torch.promote_types(received.dtype, torch.float32)
        return received.sum(0, dtype=wide).to(received.dtype)

    def pass_on(self, own: Tensor) -> Tensor:
        """Of every own share what [B, S, ...] has of the share in front of it; zeros for the first
        of a sample."""
        return self._shift(own, self.next, self.previous)

    def pass_back(self, own: Tensor) -> Tensor:
        """The same of the share behind it."""
        return self._shift(own, self.previous, self.next)

    def _shift(
        self, own: Tensor, to: Sequence[tuple[int, int]], came: Sequence[tuple[int, int]]
    ) -> Tensor:
        sent = own[:, [place for _, place in to]].movedim(1, 0).contiguous()
        received = sent.new_empty(len(came), *sent.shape[1:])
        to_each, from_each = (
            [sum(peer == rank for peer, _ in pairs) for rank in range(self.group.size())]
            for pairs in (to, came)
        )
        dist.all_to_all_single(received, sent, from_each, to_each, group=self.group)
        self._count(sent[:1], sum(peer != self.group.rank() for peer, _ in to))
        shifted = torch.zeros_like(own)
        shifted[:, [place for _, place in came]] = received.movedim(0, 1)
        return shifted

    def _count(self, tensor: Tensor, times: int) -> None:
        self.bytes_sent += times * tensor.numel() * tensor.element_size()


class _Context(Context, Protocol):
    peers: ShareGroup
    kept: int


class Fronts(Function):
    """From the last tokens of the own shares, [B, S, n, P], those in front of them."""

    @staticmethod
    def forward(ctx: _Context, peers: ShareGroup, ends: Tensor) -> Tensor:
        ctx.peers = peers
        return peers.pass_on(ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, dfronts: Tensor) -> tuple[None, Tensor]:
        return None, ctx.peers.pass_back(dfronts)


class Gather(Function):
    """From [B, S, t, P] of every rank what is there of the samples up to the end of the last own
    share, [B, n t, P]. The gradients of a token are summed where it is."""

    @staticmethod
    def forward(ctx: _Context, peers: ShareGroup, own: Tensor) -> Tensor:
        ctx.peers, ctx.kept = peers, peers.shares.own[-1] + 1
        return peers.gather(own)[:, : ctx.kept].flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[None, Tensor]:
        grad = grad.unflatten(1, (ctx.kept, -1))
        missing = ctx.peers.shares.count - ctx.kept
        later = grad.new_zeros(len(grad), missing, *grad.shape[2:])
        return None, ctx.peers.sum(torch.cat((grad, later), dim=1))


class Scan(Function):
    """States [B, S, H, K, V] in front of the own shares, of which each makes A S + B of the state S
    in front of it: from [B | A] of the own ones, [B, S, H, K, V + K].

    The gradients of the states go back through the same maps, transposed: ranks need those of
    others' states, and not of others' maps.
    """

    @staticmethod
    def forward(ctx: _Context, peers: ShareGroup, own: Tensor) -> Tensor:
        key_size = own.shape[-2]
        shares = peers.gather(own)
        ends, maps = shares.split([own.shape[-1] - key_size, key_size], dim=-1)
        with torch.autocast(own.device.type, enabled=False):
            entering = scan(maps, ends)
        here = torch.stack([entering[share] for share in peers.shares.own], dim=1)
        ctx.peers = peers
        ctx.save_for_backward(maps.contiguous(), here)
        return here

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, dentering: Tensor) -> tuple[None, Tensor]:
        maps, here = ctx.saved_tensors
        dentering = ctx.peers.gather(dentering)
        # That of the state behind a share, from the last one, behind which nothing is.
        behind = [torch.zeros_like(dentering[:, 0])]
        for share in reversed(range(1, ctx.peers.shares.count)):
            behind.append(dentering[:, share] + maps[:, share].mT @ behind[-1])
        behind.reverse()
        dends = torch.stack([behind[share] for share in ctx.peers.shares.own], dim=1)
        return None, torch.cat((dends, dends @ here.mT), dim=-1)


def scan(maps: Tensor, ends: Tensor, first: Tensor | None = None) -> list[Tensor]:
    """The state in front of every share, [B, H, K, V], of ``maps`` [B, 2C, H, K, K] and ``ends``
    [B, 2C, H, K, V], A and B of the shares in order; ``first`` is that of the first one (None: an
    empty one)."""
    entering = [torch.zeros_like(ends[:, 0]) if first is None else first]
    for share in range(maps.shape[1] - 1):
        entering.append(maps[:, share] @ entering[-1] + ends[:, share])
    return entering
