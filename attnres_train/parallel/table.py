"""Which rank of a run is what, as a table."""

from __future__ import annotations

from attnres_train.config.schema import ParallelConfig
from attnres_train.parallel.megatron import lay_out

_SHOWN_RANKS = 16


def rank_table(parallel: ParallelConfig, world_size: int) -> str:
    """The place of every rank in each kind of group that has several, a line a rank; of many ranks
    the first ones, and the rule. Empty for a process alone."""
    if world_size == 1:
        return ""
    grid = lay_out(parallel, world_size)
    kinds = {
        "stage": grid.pipelines,
        "replica": grid.data,
        "context": grid.context,
        "tensor": grid.tensor,
        "experts": grid.experts,
    }
    several = {name: _places(groups) for name, groups in kinds.items() if len(groups[0]) > 1}
    rows = [("rank", *several)]
    for rank in range(min(world_size, _SHOWN_RANKS)):
        rows.append((str(rank), *(str(places[rank]) for places in several.values())))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.rjust, row, widths)) for row in rows]
    if world_size > _SHOWN_RANKS:
        lines.append(
            f"and {world_size - _SHOWN_RANKS} more: tensor varies fastest, then context, replica, "
            "stage; neighbours of a stage share experts"
        )
    return "\n".join(lines)


def _places(groups: list[list[int]]) -> dict[int, int]:
    """By rank, where it is in its group."""
    return {rank: place for group in groups for place, rank in enumerate(group)}
