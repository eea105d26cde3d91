"""Layout: which decoder layers form which model chunk, and which rank holds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from attnres_train.errors import UserError
from attnres_train.model.blocks import Blocks


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
) -> Layout:
    """The layout of a model of ``num_layers`` decoder layers on ``num_ranks`` pipeline ranks.

    ``layout`` is ``"even"`` or the number of layers of each chunk in model order; ``block_size``
    counts sublayers and is None for the standard residual stream. Raises UserError, naming the
    configuration key, if the layers cannot be split that way.
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
    elif isinstance(layout, str):
        raise UserError(
            f"parallel.layout is '{layout}': write 'even' or a list of layers per chunk"
        )
    elif len(layout) != num_chunks:
        raise UserError(
            f"parallel.layout lists {len(layout)} chunks, but {split} makes {num_chunks}"
        )
    else:
        bounds = (0, *accumulate(layout))
    return Layout(Blocks(2 * num_layers, block_size), bounds, num_ranks)


def even_bounds(num_layers: int, num_chunks: int) -> tuple[int, ...]:
    """Bounds of chunks whose sizes differ by at most one, the larger ones first: the last chunk,
    which also has the output head, is never larger than another."""
    size, larger = divmod(num_layers, num_chunks)
    return tuple(size * chunk + min(chunk, larger) for chunk in range(num_chunks + 1))


def balanced_bounds(costs: Sequence[float], num_chunks: int) -> tuple[int, ...]:
    """Bounds that minimise the cost of the most expensive chunk, exactly.

    ``costs`` has one non-negative number per decoder layer; every chunk gets at least one layer.
    Dynamic programming over (chunk, layers so far); the cost of the best split never falls as
    layers are added, so each cell is a binary search. Raises ValueError if there are fewer layers
    than chunks.
    """
    num_layers = len(costs)
    if not 1 <= num_chunks <= num_layers:
        raise ValueError(f"cannot split {num_layers} layers into {num_chunks} chunks")
    total = (0.0, *accumulate(costs))
    best = [0.0] + [float("inf")] * num_layers  # best[n]: first n layers in the chunks so far
    last_starts = []
    for chunk in range(num_chunks):
        following, starts = [float("inf")] * (num_layers + 1), [0] * (num_layers + 1)
        for end in range(chunk + 1, num_layers + 1):
            starts[end] = _best_start(best, total, chunk, end)
            following[end] = max(best[starts[end]], total[end] - total[starts[end]])
        best = following
        last_starts.append(starts)
    bounds = [num_layers]
    for starts in reversed(last_starts):
        bounds.append(starts[bounds[-1]])
    return tuple(reversed(bounds))


def _best_start(best: Sequence[float], total: Sequence[float], first: int, end: int) -> int:
    """The start in ``first..end-1`` of a chunk up to ``end`` that keeps the maximum lowest.

    ``best`` rises and the chunk's own cost falls with the start: the optimum lies where they cross.
    """
    low, high = first, end - 1
    while low < high:
        middle = (low + high) // 2
        if best[middle] >= total[end] - total[middle]:
            high = middle
        else:
            low = middle + 1
    candidates = (low - 1, low) if low > first else (low,)
    return min(candidates, key=lambda start: max(best[start], total[end] - total[start]))
