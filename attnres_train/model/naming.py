"""Names of the released checkpoints (moonshotai/Kimi-Linear-48B-A3B; Attention Residuals as in
Kimi-K3). E routed experts are stacked here and single tensors there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_STACKED = (".experts.w1", ".experts.w2", ".experts.w3")


def released_tensors(
    named_tensors: Iterable[tuple[str, Tensor]], first_expert: int = 0
) -> Iterator[tuple[str, Tensor]]:
    """Released names and views for tensors named as a chunk's parameters are.

    ``layers.i.block_sparse_moe.experts.w1`` [E, ...] becomes E views named
    ``model.layers.i.block_sparse_moe.experts.e.w1.weight``, counted from ``first_expert`` where a
    stack holds only some of the layer's; every other tensor is one view of itself under its name
    after ``model.`` (``lm_head.weight`` has no such prefix). Some of a stack, named by `part_of`,
    become the views that these are in the stack's. Works for parameters, buffers,
    gradients and any optimizer state of a parameter's shape.
    """
    for part, tensor in named_tensors:
        name, first = whole_of(part)
        released = name if name.startswith("lm_head.") else f"model.{name}"
        if name.endswith(_STACKED):
            prefix, matrix = released.rsplit(".", 1)
            # Views, so that loading writes through to the stack.
            for expert, view in enumerate(tensor.unbind(0), first_expert + first):
                yield f"{prefix}.{expert}.{matrix}.weight", view
        else:
            yield released, tensor


def part_of(name: str, first: int, stop: int) -> str:
    """The name of matrices ``first .. stop - 1`` of stack ``name``: ``experts.w1[4:8]``."""
    return f"{name}[{first}:{stop}]"


def whole_of(name: str) -> tuple[str, int]:
    """The stack that `part_of` has named a part of, and the part's first matrix; of anything else
    the name itself and 0."""
    whole, _, part = name.partition("[")
    return whole, int(part.partition(":")[0]) if part else 0
