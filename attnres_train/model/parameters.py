"""What is to be known of a parameter besides its values: how it begins and how it is updated.

A module that owns parameters tells their rules in a method ``parameter_rules``; what the reads of
the residual stream learn has those of the residual's kind. Pure Python but for what an initialiser
does when it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from attnres_train.config.model_schema import ModelConfig

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
    is_expert: bool = False
    """Whether it is a stack of routed experts, of which every rank may hold some."""
    role: Literal["", "router", "low_rank"] = ""
    """What a linear map is, where an optimizer may treat it apart: a ``router``'s, or a
    ``low_rank`` factor of another map."""
    heads: int = 1
    """Of a linear map to heads, the number of those here: the rows of each lie together."""
    split: int | None = None
    """The axis along which tensor-parallel ranks share it; None: each of them has all of it."""


@dataclass(frozen=True)
class Learned:
    """A parameter of a read of the residual stream."""

    shape: tuple[int, ...]
    rule: ParameterRule

    @property
    def num_elements(self) -> int:
        return prod(self.shape)


def constant(value: float) -> Initialiser:
    """Every element is ``value``."""
    return lambda tensor, rng: tensor.fill_(value)


def normal(std: float) -> Initialiser:
    """N(0, ``std``^2)."""
    return lambda tensor, rng: tensor.normal_(0.0, std, generator=rng)


def uniform(bound: float) -> Initialiser:
    """U(-``bound``, ``bound``)."""
    return lambda tensor, rng: tensor.uniform_(-bound, bound, generator=rng)


def matrices(std: float, names: Iterable[str], **more: Any) -> dict[str, ParameterRule]:
    """Rules of linear maps that begin as N(0, ``std``^2); ``more`` fields of `ParameterRule`."""
    return dict.fromkeys(names, ParameterRule(normal(std), is_matrix=True, **more))


@runtime_checkable
class OwnsParameters(Protocol):
    """A module that has rules for parameters of its own, or of modules below it."""

    def parameter_rules(self, std: float) -> dict[str, ParameterRule]:
        """Rules by the names of parameters from here; ``std`` is `model.initializer_range`."""
        ...


class ModelPart(Protocol):
    """A chunk or a decoder layer."""

    config: ModelConfig

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


def parameter_rules(module: ModelPart) -> dict[str, ParameterRule]:
    """The one rule of every parameter of ``module``, by name and in their order: what it and the
    modules below it say that they own (`OwnsParameters`).

    Raises ValueError for a parameter that has no rule or two.
    """
    rules: dict[str, ParameterRule] = {}
    owners: dict[str, OwnsParameters] = {}
    for place, part in module.named_modules():
        if not isinstance(part, OwnsParameters):
            continue
        prefix = f"{place}." if place else ""
        owners[prefix] = part
        for name, rule in part.parameter_rules(module.config.initializer_range).items():
            if prefix + name in rules:
                raise ValueError(
                    f"parameter {prefix + name!r} has two rules, one of {type(part).__name__}"
                )
            rules[prefix + name] = rule
    names = [name for name, _ in module.named_parameters()]
    for name in names:
        if name not in rules:
            near = max((prefix for prefix in owners if name.startswith(prefix)), key=len)
            owner = type(owners[near])
            raise ValueError(
                f"parameter {name!r} has no rule: let {owner.__module__}.{owner.__name__}."
                "parameter_rules say how it begins and whether it is a matrix and decays"
            )
    return {name: rules[name] for name in names}
