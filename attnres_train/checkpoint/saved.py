"""What a checkpoint holds of a tensor: the whole of it in one place, or in parts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise, product
from math import prod
from typing import NamedTuple

import torch

from attnres_train.checkpoint.tensor_file import TensorSpec
from attnres_train.model.parts import Place, Span, common, named, parsed, whole_shape


class SavedPart(NamedTuple):
    place: Place
    entry: TensorSpec


@dataclass(frozen=True)
class SavedTensor:
    """A tensor of a checkpoint: its whole shape, dtype (``float32``), and the parts that lie in the
    files. Together they are all of it, and no two have an element in common."""

    name: str
    shape: list[int]
    dtype: str
    parts: tuple[SavedPart, ...]

    def __str__(self) -> str:
        return f"{self.shape} {self.dtype}"

    def like(self, other: SavedTensor) -> bool:
        return (self.shape, self.dtype) == (other.shape, other.dtype)

    @property
    def checksums(self) -> dict[Place, int | None]:
        return {place: entry.crc32 for place, entry in self.parts}

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for _, entry in self.parts)

    def empty(self) -> torch.Tensor:
        """A tensor to be read into."""
        return torch.empty(self.shape, dtype=getattr(torch, self.dtype))


def assembled(entries: Iterable[tuple[str, TensorSpec]]) -> dict[str, SavedTensor]:
    """The tensors that (name, part) pairs make up, names as in `model.parts`. What is there twice,
    such as the number of updates, which every rank writes, counts once.

    Raises ValueError where parts are missing, overlap, or are not of one tensor.
    """
    by_name: dict[str, dict[Place, TensorSpec]] = {}
    for text, entry in entries:
        name, place = parsed(text, entry.shape)
        by_name.setdefault(name, {}).setdefault(place, entry)
    return {name: _of_parts(name, parts) for name, parts in by_name.items()}


def _of_parts(name: str, parts: dict[Place, TensorSpec]) -> SavedTensor:
    kinds = {(tuple(whole_shape(place)), entry.dtype) for place, entry in parts.items()}
    if len(kinds) > 1:
        told = " and ".join(sorted(f"{list(shape)} {dtype}" for shape, dtype in kinds))
        raise ValueError(f"parts of {name} are of different tensors: {told}")
    ((shape, dtype),) = kinds
    if len(parts) > 1 or prod(shape) != next(iter(parts.values())).numel:
        check_cover(name, list(parts))
    saved = tuple(SavedPart(place, entry) for place, entry in parts.items())
    return SavedTensor(name, list(shape), dtype, saved)


def check_cover(name: str, places: list[Place], *, once: bool = True) -> None:
    """Raise ValueError, naming a range, unless parts at ``places`` are all of tensor ``name``, with
    ``once`` each element in one of them alone."""
    shape = whole_shape(places[0])
    ends = [
        sorted({0, size, *(end for place in places for end in place[axis][:2])})
        for axis, size in enumerate(shape)
    ]
    index = [{end: i for i, end in enumerate(of_axis)} for of_axis in ends]
    counts = torch.zeros([len(of_axis) - 1 for of_axis in ends], dtype=torch.int32)
    for place in places:
        cells = zip(index, place, strict=True)
        counts[tuple(slice(of[span.start], of[span.stop]) for of, span in cells)] += 1
    if bool((counts == 1).all()) or (not once and bool(counts.all())):
        return
    steps = (pairwise(of_axis) for of_axis in ends)
    for cell, count in zip(product(*steps), counts.flatten().tolist(), strict=True):
        where = tuple(Span(*step, size) for step, size in zip(cell, shape, strict=True))
        if count == 0:
            raise ValueError(f"{named(name, where)} is missing")
        if count > 1 and once:
            first, second, *_ = [named(name, place) for place in places if common(place, where)]
            raise ValueError(f"{first} and {second} overlap")
