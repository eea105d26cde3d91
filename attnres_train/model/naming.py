"""Names of the released checkpoints (moonshotai/Kimi-Linear-48B-A3B; Attention Residuals as in
Kimi-K3). E routed experts are stacked here and single tensors there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from attnres_train.model.parts import Place, named, parsed, whole, within

if TYPE_CHECKING:
    from torch import Tensor

_STACKED = (".experts.w1", ".experts.w2", ".experts.w3")


def released_tensors(
    named_tensors: Iterable[tuple[str, Tensor]],
    first_expert: int = 0,
    places: Mapping[str, Place] = MappingProxyType({}),
) -> Iterator[tuple[str, Tensor]]:
    """Released names and views for tensors named as a chunk's parameters are.

    ``layers.i.block_sparse_moe.experts.w1`` [E, ...] becomes E views named
    ``model.layers.i.block_sparse_moe.experts.e.w1.weight``, counted from ``first_expert`` where a
    stack holds only some of the layer's; every other tensor is one view of itself under its name
    after ``model.`` (``lm_head.weight`` has no such prefix). ``places`` are those of parameters of
    which there is a part here: their names say so (`model.parts`). A part of what is here, named as
    such, becomes the views, or the part of the whole, that it is. Works for parameters, buffers,
    gradients and any optimizer state of a parameter's shape.
    """
    for text, tensor in named_tensors:
        name, place = parsed(text, tensor.shape)
        released = name if name.startswith("lm_head.") else f"model.{name}"
        if name.endswith(_STACKED):
            prefix, matrix = released.rsplit(".", 1)
            # Views, so that loading writes through to the stack.
            for expert, view in enumerate(tensor.unbind(0), first_expert + place[0].start):
                yield f"{prefix}.{expert}.{matrix}.weight", view
        else:
            outer = places.get(name) or whole([span.of for span in place])
            yield named(released, within(outer, place)), tensor
