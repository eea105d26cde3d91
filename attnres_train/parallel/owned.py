"""An optimizer of what this replica owns, as one of the whole model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from attnres_train.parallel.gathering import ParameterGather
from attnres_train.parallel.reduction import GradientReduction


class Optimizer(Protocol):
    """What is asked of an optimizer."""

    def step(self, lr: float) -> None:
        """Update the parameters by their gradients, with learning rate ``lr``."""

    def scale(self, name: str, factors: Tensor) -> None:
        """Multiply a parameter, and whatever it is a copy of, by what can be broadcast to it."""


class OwnedOptimizer:
    """``optimizer`` over the tensors of the pieces that are this replica's, whose gradients
    ``reduction`` brings, and whose new values ``gather`` takes to the other replicas.

    A step: `reduction.last_backward` and `reduction.finish`; then whatever is to be known of the
    gradients, over all ranks; then `step`, or not; then `zero_grad`.
    """

    def __init__(
        self, optimizer: Optimizer, reduction: GradientReduction, gather: ParameterGather
    ) -> None:
        self.optimizer, self.reduction, self.gather = optimizer, reduction, gather
        pieces = reduction.pieces
        self.owned: Sequence[Tensor] = [piece.tensor for piece in pieces if piece.is_mine]
        """With the gradients that the update takes."""
        self.counted: Sequence[Tensor] = [piece.tensor for piece in pieces if piece.counts_here]
        """Those of them that are to be counted here: over all ranks, each parameter once."""

    def step(self, lr: float, row_factors: Mapping[str, Tensor] | None = None) -> None:
        """One update with learning rate ``lr``, after which parameters are multiplied by their
        ``row_factors`` [rows, 1], the same on all replicas; the new values are on their way when it
        returns (see `wait`). Collective."""
        self.wait()  # nothing is changed that still is being sent
        self.optimizer.step(lr)
        for piece in self.reduction.pieces:
            factors = (row_factors or {}).get(piece.parameter_name)
            if factors is not None and piece.is_mine:
                self.optimizer.scale(piece.name, piece.of(factors))
        self.gather.start()

    def wait(self) -> None:
        """Return once this rank has all parameters as they are after the last step. Forward passes
        wait for what they read by themselves."""
        self.gather.wait()

    def zero_grad(self) -> None:
        """Free all gradients."""
        self.reduction.release()
