"""Layout: which decoder layers form which model chunk, and which rank holds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from attnres_train.errors import UserError
from attnres_train.model.blocks import Blocks

_HALVINGS = 50  # of the interval in which the lowest limit of a balanced layout lies


@dataclass(frozen=True)
class Layout:
    """The model cut into ``C = P * V`` chunks of consecutive decoder layers, in model order.

    Chunk ``c`` holds decoder layers ``bounds[c]`` to ``bounds[c + 1] - 1`` (0-based) and lives on
    pipeline rank ``c % P`` as its virtual stage ``c // P`` (the looped placement of interleaved
    1F1B, arXiv 2104.04473 section 2.2). Raises UserError for bounds that do not fit the model.
    """

    blocks: Blocks
    bounds: tuple[int, ...]
    num_ranks: int
    sublayers_per_layer: int = 2
    """2: attention and MLP. With 1 the bounds count sublayers, to plan cuts inside a layer."""

    def __post_init__(self) -> None:
        sizes = [end - start for start, end in pairwise(self.bounds)]
        if min(sizes, default=0) < 1 or self.bounds[0] != 0:
            raise UserError(
                f"parallel.layout: chunk bounds {list(self.bounds)} must start at 0 and increase: "
                "every chunk needs at least one decoder layer"
            )
        if self.bounds[-1] * self.sublayers_per_layer != self.blocks.num_sublayers:
            raise UserError(
                f"parallel.layout: the chunks hold {self.bounds[-1]} layers together, but "
                f"model.num_layers is {self.blocks.num_sublayers // self.sublayers_per_layer}"
            )
        if self.num_ranks < 1 or self.num_chunks % self.num_ranks:
            raise UserError(
                f"parallel.layout: {self.num_chunks} chunks cannot be dealt out evenly to "
                f"parallel.pipeline_model_parallel_size = {self.num_ranks} ranks"
            )

    @property
    def num_chunks(self) -> int:
        return len(self.bounds) - 1

    @property
    def num_virtual_stages(self) -> int:
        return self.num_chunks // self.num_ranks

    def rank_of(self, chunk: int) -> int:
        return chunk % self.num_ranks

    def virtual_stage(self, chunk: int) -> int:
        return chunk // self.num_ranks

    def chunks_of(self, rank: int) -> range:
        """The chunks on ``rank``, by virtual stage."""
        return range(rank, self.num_chunks, self.num_ranks)

    def layers(self, chunk: int) -> range:
        """Decoder layers of ``chunk``, 0-based."""
        return range(self.bounds[chunk], self.bounds[chunk + 1])

    def sublayers(self, chunk: int) -> range:
        """Sublayers of ``chunk``, 1-based (see `model.blocks`)."""
        per_layer = self.sublayers_per_layer
        return range(self.bounds[chunk] * per_layer + 1, self.bounds[chunk + 1] * per_layer + 1)


def make_layout(
    num_layers: int,
    block_size: int | None,
    num_ranks: int,
    num_virtual_stages: int,
    layout: str | Sequence[int] = "even",
    costs: Sequence[float] = (),
    partial_units: int = 1,
) -> Layout:
    """The layout of a model of ``num_layers`` decoder layers on ``num_ranks`` pipeline ranks.

    ``layout`` is ``"even"``, ``"auto"`` (balanced by ``costs``, one number per decoder layer), or
    the number of layers of each chunk in model order; ``block_size`` and ``partial_units`` are
    those of `Blocks`. Raises UserError, naming the configuration key, if the layers
    cannot be split that way.
    """
    num_chunks = num_ranks * num_virtual_stages
    split = (
        f"parallel.pipeline_model_parallel_size {num_ranks} x "
        f"parallel.virtual_pipeline_model_parallel_size {num_virtual_stages}"
    )
    if min(num_ranks, num_virtual_stages) < 1:
        raise UserError(f"{split}: both must be at least 1")
    if num_chunks > num_layers:
        raise UserError(
            f"{split} makes {num_chunks} chunks, but model.num_layers is {num_layers}: "
            "every chunk needs at least one decoder layer"
        )
    if layout == "even":
        bounds = even_bounds(num_layers, num_chunks)
    elif layout == "auto":
        bounds = balanced_bounds(costs, num_ranks, num_virtual_stages)
    elif isinstance(layout, str):
        raise UserError(
            f"parallel.layout is '{layout}': write 'even', 'auto' or a list of layers per chunk"
        )
    elif len(layout) != num_chunks:
        raise UserError(
            f"parallel.layout lists {len(layout)} chunks, but {split} makes {num_chunks}"
        )
    else:
        bounds = (0, *accumulate(layout))
    return Layout(Blocks(2 * num_layers, block_size, partial_units), bounds, num_ranks)


def even_bounds(num_layers: int, num_chunks: int) -> tuple[int, ...]:
    """Bounds of chunks whose sizes differ by at most one, the larger ones first: the last chunk,
    which also has the output head, is never larger than another."""
    size, larger = divmod(num_layers, num_chunks)
    return tuple(size * chunk + min(chunk, larger) for chunk in range(num_chunks + 1))


def balanced_bounds(
    costs: Sequence[float], num_ranks: int, num_virtual_stages: int
) -> tuple[int, ...]:
    """Bounds that keep the most expensive chunk as cheap as can be, each chunk with a layer at
    least. ``costs`` has one non-negative number per decoder layer, the head's in the last.

    With more than one virtual stage the last layer, with the head, may alone cost more than any
    other chunk has to. Its virtual stage is then slow anyhow: all its chunks may cost as much, so
    that those of the other virtual stages get by with less. For one virtual stage the result is
    the lowest maximum there is. Raises ValueError if there are fewer layers than chunks.
    """
    num_chunks = num_ranks * num_virtual_stages
    if not 1 <= num_chunks <= len(costs):
        raise ValueError(f"cannot split {len(costs)} layers into {num_chunks} chunks")

    def split(limit: float) -> tuple[int, ...] | None:
        limits = [limit] * (num_chunks - num_ranks) + [max(limit, costs[-1])] * num_ranks
        # Even shares may not fit where full chunks do: costs are those of whole layers.
        return _fill(costs, limits, evenly=True) or _fill(costs, limits, evenly=False)

    low = max(costs[:-1], default=0.0)
    *_, high = accumulate(costs)  # in the order of `_fill`: sum() rounds less from Python 3.12 on
    bounds = split(high)
    assert bounds is not None  # all the layers that can be in one chunk fit into it
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if found := split(middle):
            bounds, high = found, middle
        else:
            low = middle
    return bounds


def _fill(costs: Sequence[float], limits: Sequence[float], evenly: bool) -> tuple[int, ...] | None:
    """Bounds of chunks within ``limits``, filled from the last to the first; None if layers are
    left over. ``evenly``: a chunk is full, too, when it has its share of what was left."""
    total = (0.0, *accumulate(costs))
    bounds = [len(costs)]
    for chunk in reversed(range(len(limits))):
        end = bounds[-1]
        start = end - 1
        share = total[end] / (chunk + 1) if evenly else float("inf")
        while (
            start > chunk  # one layer is left for each chunk before
            and total[end] - total[start] < share
            and total[end] - total[start - 1] <= limits[chunk]
        ):
            start -= 1
        bounds.append(start)
    return tuple(reversed(bounds)) if bounds[-1] == 0 else None
