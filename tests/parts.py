"""Parts of tensors, under names that say which they are, and the wholes that they make up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from attnres_train.checkpoint.saved import check_cover
from attnres_train.model.parts import Place, indices, parsed, whole, whole_shape


def the_part(wholes: Mapping[str, Tensor], text: str, like: Tensor) -> Tensor:
    """What ``text``, of the shape of ``like``, is of the tensors ``wholes``."""
    name, place = parsed(text, like.shape)
    return wholes[name][indices(place, whole(wholes[name].shape))]


def made_whole(parts: Iterable[tuple[str, Tensor]], *, once: bool = True) -> dict[str, Tensor]:
    """Whole tensors of parts. Each element has to be there, and ``once`` alone; what is there more
    than once has to be equal."""
    by_name: dict[str, list[tuple[Place, Tensor]]] = {}
    for text, tensor in parts:
        name, place = parsed(text, tensor.shape)
        by_name.setdefault(name, []).append((place, tensor))
    wholes = {}
    for name, found in by_name.items():
        check_cover(name, [place for place, _ in found], once=once)
        wholes[name] = torch.empty(whole_shape(found[0][0]), dtype=found[0][1].dtype)
        everywhere = whole(wholes[name].shape)
        for place, tensor in found:
            wholes[name][indices(place, everywhere)] = tensor
        for place, tensor in found:
            assert torch.equal(wholes[name][indices(place, everywhere)], tensor), f"{name} differs"
    return wholes
