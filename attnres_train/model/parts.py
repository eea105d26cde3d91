"""Parts of tensors: where one lies in the whole, and how a name says so.

``embed_tokens.weight[0:4096 of 163840]`` are rows of a table, ``o_proj.weight[:, 64:128 of 256]``
columns of a matrix; a name without brackets is that of a whole tensor. Pure Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Span(NamedTuple):
    """Indices ``start .. stop - 1`` of an axis of length ``of``."""

    start: int
    stop: int
    of: int

    @property
    def is_whole(self) -> bool:
        return self.stop - self.start == self.of

    def __str__(self) -> str:
        return ":" if self.is_whole else f"{self.start}:{self.stop} of {self.of}"


Place = tuple[Span, ...]
"""Where a part lies in the whole tensor: a span per axis."""


def whole(shape: Sequence[int]) -> Place:
    """The place of all of a tensor of ``shape``."""
    return tuple(Span(0, size, size) for size in shape)


def is_whole(place: Place) -> bool:
    return all(span.is_whole for span in place)


def part_shape(place: Place) -> list[int]:
    return [span.stop - span.start for span in place]


def whole_shape(place: Place) -> list[int]:
    """Of the tensor of which it is a part."""
    return [span.of for span in place]


def narrowed(place: Place, axis: int, start: int, stop: int) -> Place:
    """The place of ``start .. stop - 1`` along ``axis`` of what lies at ``place``."""
    span = place[axis]
    span = Span(span.start + start, span.start + stop, span.of)
    return (*place[:axis], span, *place[axis + 1 :])


def one_of(shape: Sequence[int], axis: int, index: int, count: int) -> Place:
    """The place of part ``index`` of ``count`` equal ones, of ``shape`` each, along ``axis``."""
    size, place = shape[axis], whole(shape)
    span = Span(index * size, (index + 1) * size, count * size)
    return (*place[:axis], span, *place[axis + 1 :])


def within(outer: Place, inner: Place) -> Place:
    """Where the part at ``inner`` of what lies at ``outer`` lies in the whole."""
    return tuple(
        Span(there.start + here.start, there.start + here.stop, there.of)
        for there, here in zip(outer, inner, strict=True)
    )


def common(a: Place, b: Place) -> Place | None:
    """What two parts of one tensor have in common; None where that is nothing."""
    pairs = zip(a, b, strict=True)
    both = tuple(Span(max(x.start, y.start), min(x.stop, y.stop), x.of) for x, y in pairs)
    return both if all(span.start < span.stop for span in both) else None


def indices(inner: Place, outer: Place) -> tuple[slice, ...]:
    """Of the part at ``inner`` in the tensor that lies at ``outer``, both places in the whole."""
    return tuple(
        slice(here.start - there.start, here.stop - there.start)
        for here, there in zip(inner, outer, strict=True)
    )


def named(name: str, place: Place) -> str:
    """The name of the part of tensor ``name`` that lies at ``place``."""
    spans = [str(span) for span in place]
    while spans and spans[-1] == ":":
        spans.pop()
    return f"{name}[{', '.join(spans)}]" if spans else name


def is_part(text: str) -> bool:
    """Whether it is the name of a part."""
    return text.endswith("]")


def tensor_of(text: str) -> str:
    """The name of the tensor that `named` has named a part of."""
    return text.partition("[")[0]


def parsed(text: str, shape: Sequence[int]) -> tuple[str, Place]:
    """Name and place from what `named` has made of them; ``shape`` is the part's. Raises ValueError
    where the two do not fit."""
    name, _, inside = text.partition("[")
    told = inside.removesuffix("]").split(", ") if inside else []
    if len(told) > len(shape):
        raise ValueError(f"{text} is not a part of shape {list(shape)}")
    told += [":"] * (len(shape) - len(told))
    place = tuple(map(_span, told, shape))
    if part_shape(place) != list(shape) or any(not 0 <= s.start <= s.stop <= s.of for s in place):
        raise ValueError(f"{text} is not a part of shape {list(shape)}")
    return name, place


def _span(text: str, size: int) -> Span:
    if text == ":":
        return Span(0, size, size)
    ends, of = text.split(" of ")
    start, stop = ends.split(":")
    return Span(int(start), int(stop), int(of))
