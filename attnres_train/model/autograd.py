"""The ``ctx`` of an autograd function, typed: torch's stubs leave it open."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Context(Protocol):
    """What forward leaves for backward. A function that leaves more than tensors names it in a
    protocol of its own."""

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]: ...

    def save_for_backward(self, *tensors: Tensor) -> None: ...

    def mark_non_differentiable(self, *outputs: Tensor) -> None: ...
