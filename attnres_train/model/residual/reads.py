"""Where the parameters of a read live: in the module that owns it, under the read's prefix."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import nn

from attnres_train.model.parameters import ParameterRule
from attnres_train.model.residual.stream import Residual


class Weights(nn.Module):
    """Parameters by name, and nothing else: what ``gates`` is in ``mlp_res_gates.weight``."""


class Read:
    """The read before ``sublayer``, the names of whose parameters begin with ``prefix``."""

    def __init__(self, residual: Residual, sublayer: int, prefix: str) -> None:
        self.residual, self.sublayer, self.prefix = residual, sublayer, prefix
        self.names = tuple(residual.kind.learned(sublayer))

    def create(self, owner: nn.Module) -> None:
        """Give ``owner`` the parameters, uninitialised."""
        for name, learned in self.residual.kind.learned(self.sublayer).items():
            *places, leaf = f"{self.prefix}_{name}".split(".")
            module = owner
            for place in places:
                if not hasattr(module, place):
                    module.add_module(place, Weights())
                module = module.get_submodule(place)
            module.register_parameter(leaf, nn.Parameter(torch.empty(learned.shape)))

    def reader(self, owner: nn.Module) -> Any:
        """What the residual makes of the parameters of ``owner``."""
        weights = {name: attrgetter(f"{self.prefix}_{name}")(owner) for name in self.names}
        return self.residual.reader(self.sublayer, weights)

    def rules(self) -> dict[str, ParameterRule]:
        """By the names of the parameters in the owner."""
        learned = self.residual.kind.learned(self.sublayer)
        return {f"{self.prefix}_{name}": parameter.rule for name, parameter in learned.items()}
