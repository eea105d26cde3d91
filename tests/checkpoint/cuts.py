"""Tensors cut at random into parts, as ranks of a grid might hold them."""

from __future__ import annotations

import random
from itertools import pairwise

import torch
from torch import Tensor

from attnres_train.model.parts import Place, indices, named, narrowed, whole

SHAPES = {"table": (12, 5), "map": (6, 8), "stack": (2, 3, 4), "vector": (9,), "one": ()}
DTYPES = {"map": torch.bfloat16, "vector": torch.int64}


def originals(seed: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {
        name: (100 * torch.randn(shape, generator=rng)).to(DTYPES.get(name, torch.float64))
        for name, shape in SHAPES.items()
    }


def cut(place: Place, rng: random.Random) -> list[Place]:
    """``place`` in one to four parts along an axis, and perhaps one of these along another."""
    if not place:
        return [place]
    axis = rng.randrange(len(place))
    length = place[axis].stop - place[axis].start
    ends = sorted({0, length, *(rng.randrange(length + 1) for _ in range(rng.randrange(4)))})
    found = [narrowed(place, axis, *pair) for pair in pairwise(ends)]
    if len(found) > 1 and rng.random() < 0.5:
        found += cut(found.pop(rng.randrange(len(found))), rng)
    return found


def dealt(seed: int, ranks: int) -> list[list[tuple[str, Place]]]:
    """Parts that make up every tensor, dealt to ``ranks``."""
    rng = random.Random(seed)
    hands: list[list[tuple[str, Place]]] = [[] for _ in range(ranks)]
    for name, shape in SHAPES.items():
        for place in cut(whole(shape), rng):
            hands[rng.randrange(ranks)].append((name, place))
    return hands


def held(tensors: dict[str, Tensor], hand: list[tuple[str, Place]]) -> dict[str, Tensor]:
    """What a rank has of ``tensors``."""
    return {
        named(name, place): tensors[name][indices(place, whole(SHAPES[name]))].clone()
        for name, place in hand
    }


def blank(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}
