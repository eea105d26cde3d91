"""Gradients reduced to their owners while the backward pass still runs.

A parameter's gradient is whole when the last micro-batch's backward pass has added to it. From then
on it can leave: buckets start one after the other, in the order of their making, as all of theirs
are there. What nothing depended on (the first sublayer's pseudo-query) has a gradient of zeros.

A reduction to one owner and not a reduce-scatter: that would want shares of equal length, and so
padding, or matrices that are cut; per rank as many bytes pass (docs/benchmarks.md).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from attnres_train.parallel.flat import Flat
from attnres_train.parallel.pieces import Piece, bucketed, global_owner


class GradientReduction:
    """The gradients of a rank's ``pieces``, in model order, averaged over ``replicas`` of the model
    on their owners; with ``to_all`` on every replica, for who looks at them. ``late``: names of
    parameters that a forward pass reads before the layers that they belong to, so that their
    gradients come after those of these layers.

    Of a step: ``last_backward(chunk)`` around each chunk's last backward pass (without it nothing
    is wrong, only late), then `finish`, then `release` before the next one.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        replicas: int,
        to_all: bool = False,
        late: Container[str] = (),
    ) -> None:
        self.pieces, self._replicas, self._to_all = pieces, replicas, to_all
        self._pieces: dict[int, list[Piece]] = {}
        """By chunk."""
        for piece in pieces:
            self._pieces.setdefault(piece.chunk, []).append(piece)
        self._buckets = {
            chunk: [_Bucket(bucket, to_all) for bucket in bucketed(_by_arrival(of_chunk, late))]
            for chunk, of_chunk in self._pieces.items()
        }
        self._waiting: dict[int, deque[_Bucket]] = {}
        """Of the chunk whose last backward pass is under way: what has not started yet."""
        self._arrived: set[Tensor] = set()
        self._started: list[_Bucket] = []
        self._over: set[int] = set()
        """Chunks that had their last backward pass."""
        for chunk, of_chunk in self._pieces.items():
            for parameter in dict.fromkeys(piece.parameter for piece in of_chunk if piece.travels):
                parameter.register_post_accumulate_grad_hook(self._hook(chunk))

    @contextmanager
    def last_backward(self, chunk: int) -> Iterator[None]:
        """Around the last backward pass of ``chunk`` in a step: gradients may leave as they come.
        Replicas make these passes in the same order."""
        self._waiting[chunk] = deque(self._buckets[chunk])
        yield
        self._start_rest(chunk)

    def finish(self) -> None:
        """Wait for all. Afterwards ``.grad`` of every owned piece's tensor is the mean over the
        replicas. Unless it goes to all, a parameter of which this rank owns nothing has none, and
        one of which it owns a part has zeros in the rest. Collective, also of what `last_backward`
        never began."""
        for chunk in self._pieces:
            if chunk not in self._over:
                self._waiting[chunk] = deque(self._buckets[chunk])
                self._start_rest(chunk)
        for bucket in self._started:
            bucket.finish()
        self._started, self._over = [], set()
        for piece in self.pieces:
            self._settle(piece)

    def _settle(self, piece: Piece) -> None:
        gradient = piece.of(_gradient(piece.parameter))
        if self._replicas > 1 and (piece.is_mine or self._to_all):
            gradient /= self._replicas
        if piece.is_mine:
            piece.tensor.grad = gradient
        elif not self._to_all and piece.rows is None:
            piece.parameter.grad = None
        elif not self._to_all:
            gradient.zero_()

    def release(self) -> None:
        """Free all gradients."""
        for piece in self.pieces:
            piece.parameter.grad = piece.tensor.grad = None

    def _hook(self, chunk: int) -> Callable[[Tensor], None]:
        def arrived(parameter: Tensor) -> None:
            if chunk in self._over:
                raise RuntimeError(
                    f"chunk {chunk} has a backward pass after its last one of the step: a gradient "
                    f"of shape {tuple(parameter.shape)} was reduced before it was whole"
                )
            if chunk in self._waiting:
                self._arrived.add(parameter)
                self._start(chunk)

        return arrived

    def _start(self, chunk: int) -> None:
        waiting = self._waiting[chunk]
        # Never one before those in front of it: other replicas may have other gradients first.
        while waiting and waiting[0].parameters <= self._arrived:
            self._started.append(waiting.popleft())
            self._started[-1].start()

    def _start_rest(self, chunk: int) -> None:
        for piece in self._pieces[chunk]:
            self._arrived.add(piece.parameter)
        self._start(chunk)
        del self._waiting[chunk]
        self._arrived.clear()
        self._over.add(chunk)


def _by_arrival(pieces: Sequence[Piece], late: Container[str]) -> list[Piece]:
    """Backwards, as gradients come to be. One that is late would hold up its bucket, and so all
    behind it."""
    backwards = list(reversed(pieces))
    return sorted(backwards, key=lambda piece: piece.parameter_name in late)


class _Bucket:
    """Pieces whose gradients travel together."""

    def __init__(self, pieces: list[Piece], to_all: bool) -> None:
        self.pieces = pieces
        self.to_all = to_all or pieces[0].owner is None
        self.parameters = {piece.parameter for piece in pieces}
        self._flat: Flat | None = None
        self._work: dist.Work | None = None

    def start(self) -> None:
        first = self.pieces[0]
        self._flat = Flat([piece.of(_gradient(piece.parameter)) for piece in self.pieces])
        values, group = self._flat.values, first.group
        if self.to_all:
            self._work = dist.all_reduce(values, group=group, async_op=True)
        else:
            self._work = dist.reduce(values, global_owner(first), group=group, async_op=True)

    def finish(self) -> None:
        assert self._work is not None and self._flat is not None
        self._work.wait()
        if self.to_all or self.pieces[0].is_mine:
            self._flat.unpack()
        self._work = self._flat = None


@torch.no_grad()
def _gradient(parameter: nn.Parameter) -> Tensor:
    """The gradient, contiguous so that it can be sent; zeros where there is none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
    elif not parameter.grad.is_contiguous():
        parameter.grad = parameter.grad.contiguous()
    return parameter.grad
