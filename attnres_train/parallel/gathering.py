"""Updated parameters sent from their owners to all replicas, while these go on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch.distributed as dist
from torch import nn

from attnres_train.parallel.flat import Flat
from attnres_train.parallel.pieces import Piece, bucketed, global_owner

FirstReader = Callable[[Piece], nn.Module]
"""Piece -> the module whose forward pass begins before anything reads it."""


class ParameterGather:
    """The ``pieces`` of a rank's ``chunks``, in model order, from their owners to all replicas.

    `start` sends all of them, in the order of the forward pass, and returns. The forward pass of a
    module waits for what it is the ``first_reader`` of, and for what travels with that. Whoever
    else reads parameters calls `wait` before.
    """

    def __init__(
        self,
        chunks: Mapping[int, nn.Module],
        pieces: Sequence[Piece],
        first_reader: FirstReader,
    ) -> None:
        self._buckets: dict[nn.Module, list[_Bucket]] = {}
        """By the first of their readers, in the order of the forward pass."""
        for index, chunk in chunks.items():
            read: dict[nn.Module, list[Piece]] = {chunk: []}
            for piece in pieces:
                if piece.chunk == index and piece.owner is not None:
                    read.setdefault(first_reader(piece), []).append(piece)
            readers = {piece: module for module, own in read.items() for piece in own}
            self._buckets |= {module: [] for module in read}
            for bucket in bucketed(readers):
                self._buckets[readers[bucket[0]]].append(_Bucket(bucket))
        self._under_way: dict[nn.Module, list[_Bucket]] = {}
        for module in self._buckets:
            module.register_forward_pre_hook(lambda module, _: self._wait_for(module))

    def start(self) -> None:
        """Begin to send. Collective."""
        self.wait()
        for module, buckets in self._buckets.items():
            for bucket in buckets:
                bucket.start()
            self._under_way[module] = buckets

    def wait(self) -> None:
        """Return once every parameter is the owner's."""
        for module in list(self._under_way):
            self._wait_for(module)

    def _wait_for(self, module: nn.Module) -> None:
        for bucket in self._under_way.pop(module, []):
            bucket.finish()


class _Bucket:
    """Pieces that travel together."""

    def __init__(self, pieces: list[Piece]) -> None:
        self.pieces = pieces
        self._flat: Flat | None = None
        self._work: dist.Work | None = None

    def start(self) -> None:
        first = self.pieces[0]
        self._flat = Flat([piece.tensor for piece in self.pieces])
        self._work = dist.broadcast(
            self._flat.values, global_owner(first), group=first.group, async_op=True
        )

    def finish(self) -> None:
        assert self._work is not None and self._flat is not None
        self._work.wait()
        if not self.pieces[0].is_mine:
            self._flat.unpack()
        self._work = self._flat = None
