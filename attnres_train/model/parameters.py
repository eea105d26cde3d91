"""What is to be known of a parameter besides its values: how it begins and how it is updated.

Pure Python but for what an initialiser does when it is called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Generator, Tensor

Initialiser = Callable[["Tensor", "Generator"], object]
"""Fills an fp32 tensor of the parameter's shape in place; draws, if it does, from the generator."""


@dataclass(frozen=True)
class ParameterRule:
    """One parameter, or each of a stack of experts."""

    init: Initialiser
    is_matrix: bool = False
    """Whether it is a linear map, or a stack of them, and so Muon's where there is Muon. Said and
    not guessed: a pseudo-query [1, D] is a vector, a convolution [C, 1, 4] a set of filters."""
    weight_decay: bool = True
    """Whether it decays."""


@dataclass(frozen=True)
class Learned:
    """A parameter of a read of the residual stream."""

    shape: tuple[int, ...]
    rule: ParameterRule

    @property
    def num_elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


def constant(value: float) -> Initialiser:
    """Every element is ``value``."""
    return lambda tensor, rng: tensor.fill_(value)


def normal(std: float) -> Initialiser:
    """N(0, ``std``^2)."""
    return lambda tensor, rng: tensor.normal_(0.0, std, generator=rng)


def uniform(bound: float) -> Initialiser:
    """U(-``bound``, ``bound``)."""
    return lambda tensor, rng: tensor.uniform_(-bound, bound, generator=rng)
