"""Pieces: what one replica owns of one parameter, and the buckets in which they travel.

Everything is done in this order on all replicas, for a communicator pairs operations by order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from attnres_train.model.parts import named, narrowed, tensor_of, whole
from attnres_train.parallel.ownership import Share, Update, share_out

LARGE_ELEMENTS = 2**20
"""From here on a tensor travels alone and in place: nothing is copied."""
BUCKET_ELEMENTS = 2**20
"""At most so many of smaller ones travel together, in a flat copy. (gloo's reduce sends up to half
as much again of tensors that are larger.)"""
WORTH_SENDING, BUCKETS = 2**16, 16
"""And no more than one of so many parts of all, unless that is less than is worth a message: what
waits for the last gradient, and for the first parameter, is one bucket, which no pass hides."""


class Held(NamedTuple):
    """A parameter of this rank, and the ranks that hold it too."""

    chunk: int
    name: str
    parameter: nn.Parameter
    group: ProcessGroup


@dataclass(frozen=True, eq=False)
class Piece:
    """What of a parameter has the same owner: all of it, a run of a stack's matrices, or rows of a
    table."""

    chunk: int
    name: str
    """As `model.parts` names it where it is not all of the parameter that is here."""
    parameter: nn.Parameter
    rows: slice | None
    """Which, along the first axis; None: all there are."""
    group: ProcessGroup
    owner: int | None
    """Rank in ``group``; None: every replica makes the update by itself."""
    tensor: Tensor
    """What the optimizer of the owner updates: the parameter, or a view of it."""

    @property
    def parameter_name(self) -> str:
        return tensor_of(self.name)

    @property
    def is_mine(self) -> bool:
        return self.owner in (None, self.group.rank())

    @property
    def counts_here(self) -> bool:
        """Whether it is this replica's to count in sums over the whole model."""
        return self.group.rank() == (self.owner or 0)

    @property
    def travels(self) -> bool:
        return self.group.size() > 1

    @property
    def is_large(self) -> bool:
        return self.tensor.numel() >= LARGE_ELEMENTS

    def of(self, whole: Tensor) -> Tensor:
        """The piece of a tensor of the parameter's shape: a view."""
        return whole if self.rows is None else whole[self.rows]


def make_pieces(
    parameters: Sequence[Held], costs: Mapping[str, Update], sharded: bool
) -> list[Piece]:
    """The pieces of a rank's parameters, in their order. Each group's are shared out by
    themselves; unless ``sharded`` every replica has all."""
    if not sharded:
        return [
            Piece(chunk, name, parameter, None, group, None, parameter)
            for chunk, name, parameter, group in parameters
        ]
    by_group: dict[ProcessGroup, list[tuple[str, Update]]] = {}
    for _, name, _, group in parameters:
        by_group.setdefault(group, []).append((name, costs[name]))
    shares: dict[str, list[Share]] = {}
    for group, updates in by_group.items():
        for share in share_out(updates, group.size()):
            shares.setdefault(share.name, []).append(share)
    return [_piece(one, share) for one in parameters for share in shares[one.name]]


def _piece(held: Held, share: Share) -> Piece:
    chunk, name, parameter, group = held
    if share.is_whole:
        return Piece(chunk, name, parameter, None, group, share.owner, parameter)
    rows = slice(share.first, share.stop)
    view = parameter.detach()[rows]
    view.grad_dtype = parameter.grad_dtype
    place = narrowed(whole(parameter.shape), 0, share.first, share.stop)
    return Piece(chunk, named(name, place), parameter, rows, group, share.owner, view)


def bucketed(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Those that travel, each with others of its group, owner and dtype, as far as the order of
    ``pieces`` lets a bucket be full soon. Large ones are alone."""
    travelling = [piece for piece in pieces if piece.travels]
    total = sum(piece.tensor.numel() for piece in travelling)
    limit = min(BUCKET_ELEMENTS, max(WORTH_SENDING, total // BUCKETS))
    filling: dict[Hashable, list[Piece]] = {}
    sizes: Counter[Hashable] = Counter()
    for piece in travelling:
        if piece.is_large:
            yield [piece]
            continue
        way, size = _way(piece), piece.tensor.numel()
        if way in filling and sizes[way] + size > limit:
            yield filling.pop(way)
            sizes[way] = 0
        filling.setdefault(way, []).append(piece)
        sizes[way] += size
    yield from filling.values()


def _way(piece: Piece) -> Hashable:
    """What is the same of pieces that can travel together."""
    return piece.group, piece.owner, piece.tensor.dtype, piece.parameter.grad_dtype


def global_owner(piece: Piece) -> int:
    """The owner's rank among all processes, as torch's collective operations want it."""
    assert piece.owner is not None
    return dist.get_global_rank(piece.group, piece.owner)
