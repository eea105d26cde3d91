"""Matrices that tensor ranks share, each made whole on one of them: `optim.ports.MatrixExchange`.

Shapes: N matrices [A, B] of which a rank has parts [a, b]; M of them are dealt to it; R ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def matrix_exchange(mine: Iterable[tuple[str, Tensor]], group: ProcessGroup) -> MatrixDeal | None:
    """The exchange among ``group``, who share tensors, of a rank that updates ``mine``, the parts
    of matrices that have to become whole; None where all are whole. Collective. Raises RuntimeError
    unless all ranks update parts of the same matrices: they would wait for each other, or mix them
    up."""
    if group.size() == 1:
        return None
    own = [(name, list(tensor.shape)) for name, tensor in mine]
    everybody: list[Any] = [None] * group.size()
    dist.all_gather_object(everybody, own, group=group)
    if any(others != own for others in everybody):
        raise RuntimeError("ranks that share tensors do not update parts of the same matrices")
    return MatrixDeal(group)


class MatrixDeal:
    """Deals matrices to the ranks of ``group`` (those that share tensors): as many to each as to
    any other, and where that does not come out even to those with the least work so far in the
    update. A function of its calls alone: all ranks come to the same, and so does a resumed run,
    which must not orthogonalise a matrix in another batch (its last bits would differ)."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group, self.size = group, group.size()
        self._work = [0] * self.size
        """Of each rank in this update, beside what all have: elements times the short side."""

    def begin(self) -> None:
        self._work = [0] * self.size

    def send(self, parts_Nab: Tensor, axis: int) -> Dealt:
        counts = self._deal(len(parts_Nab), self._cost(parts_Nab, axis))
        return Dealt(self.group, counts, parts_Nab, axis)

    def _cost(self, parts_Nab: Tensor, axis: int) -> int:
        shape = [*parts_Nab.shape[1:]]
        shape[axis] *= self.size
        return min(shape) ** 2 * max(shape)

    def _deal(self, matrices: int, cost: int) -> list[int]:
        each, left = divmod(matrices, self.size)
        counts = [each] * self.size
        for rank in sorted(range(self.size), key=lambda rank: (self._work[rank], rank))[:left]:
            counts[rank] += 1
            self._work[rank] += cost
        return counts


class Dealt:
    """One exchange: matrices of one shape, ``counts[rank]`` of them to each rank in turn."""

    def __init__(
        self, group: ProcessGroup, counts: list[int], parts_Nab: Tensor, axis: int
    ) -> None:
        self._group, self._counts, self._axis = group, counts, axis
        self._part = parts_Nab.shape[1:]
        self._mine = [counts[group.rank()]] * len(counts)
        """Parts that come from each rank."""
        self._arriving, self._work = self._all_to_all(parts_Nab, counts, self._mine)

    def wholes(self) -> Tensor:
        self._work.wait()
        parts_RMab = self._arriving.unflatten(0, (len(self._mine), self._mine[0]))
        # The ranks' parts side by side along the axis.
        dim = 4 + self._axis
        return parts_RMab.movedim(0, dim - 1).flatten(dim - 1, dim)

    def back(self, results_MAB: Tensor) -> Tensor:
        parts_RMab = torch.stack(results_MAB.chunk(len(self._mine), dim=self._axis))
        returned, work = self._all_to_all(parts_RMab.flatten(0, 1), self._mine, self._counts)
        work.wait()
        return returned

    def _all_to_all(
        self, parts: Tensor, sent: list[int], received: list[int]
    ) -> tuple[Tensor, dist.Work]:
        out = parts.new_empty(sum(received), *self._part)
        work = dist.all_to_all_single(
            out, parts.contiguous(), received, sent, group=self._group, async_op=True
        )
        assert work is not None
        return out, work
