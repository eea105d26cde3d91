"""What an optimizer asks of its peers: matrices whole of which each tensor rank has a part.

Shapes: N matrices [A, B] of which a rank has parts [a, b]; M of them are dealt to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Sent(Protocol):
    """Parts of matrices, on their way to where each becomes whole."""

    def wholes(self) -> Tensor:
        """[M, A, B]: those that are dealt to this rank."""
        ...

    def back(self, results_MAB: Tensor) -> Tensor:
        """[N, a, b]: this rank's parts of what has been made of all N. Collective."""
        ...


class MatrixExchange(Protocol):
    """Where matrices that tensor ranks share become whole, each on one of them."""

    @property
    def size(self) -> int:
        """The number of ranks that share a matrix."""
        ...

    def begin(self) -> None:
        """An update begins. To whom matrices are dealt follows from its calls alone."""
        ...

    def send(self, parts_Nab: Tensor, axis: int) -> Sent:
        """Send parts, cut along ``axis`` (-2 or -1), to the ranks to which the matrices are dealt.
        Collective: all ranks pass the same number of equal shape. Returns at once."""
        ...


class AllHere:
    """The exchange of one process, or of matrices that lie whole on every rank."""

    size = 1

    def begin(self) -> None:
        pass

    def send(self, parts_Nab: Tensor, axis: int) -> Sent:
        return _Here(parts_Nab)


class _Here:
    def __init__(self, parts: Tensor) -> None:
        self.parts = parts

    def wholes(self) -> Tensor:
        return self.parts

    def back(self, results_MAB: Tensor) -> Tensor:
        return results_MAB
