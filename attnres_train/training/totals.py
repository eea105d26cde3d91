"""What a step came to over all ranks, by one gather."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from attnres_train.observe.hardware import peak_memory_bytes
from attnres_train.parallel.ranks import Ranks
from attnres_train.pipeline.run.engine import StepResult


class StepTotals(NamedTuple):
    """What a step came to over all ranks. ``memory_bytes`` is the sum of the processes' on CPU and
    the largest device's on CUDA."""

    loss: float
    p2p_bytes: int
    memory_bytes: int
    document_length: float
    stopping: bool
    saving: bool
    """Whether a save is under way on any rank."""
    spent: tuple[tuple[float, ...], ...]
    """Every rank's seconds by what they went to (`training.clock.Spent`): [what][rank]."""


def losses_over_ranks(ranks: Ranks, result: StepResult, count: int) -> list[float]:
    """The ``count`` losses of an evaluation, of the samples of all ranks. Collective."""
    mine = torch.zeros(1 + count, dtype=torch.float64, device=ranks.device)
    if result.loss is not None:
        mine[0], mine[1:] = 1, result.loss
    rows = mine.new_empty(ranks.world_size, len(mine))
    dist.all_gather(list(rows), mine)
    with_loss, *losses = rows.T.tolist()
    return [_mean_loss(ranks, loss, with_loss) for loss in losses]


def _mean_loss(ranks: Ranks, losses: Sequence[float], with_loss: Sequence[float]) -> float:
    """Of ranks that share samples each has a part of their losses' sum."""
    return ranks.context.size() * sum(losses) / sum(with_loss)


def over_ranks(
    ranks: Ranks,
    result: StepResult,
    *,
    document_length: float = 0.0,
    stopping: bool = False,
    saving: bool = False,
    spent: Sequence[float] = (),
) -> StepTotals:
    """The totals of a step, whose documents have ``document_length`` on this rank
    (`model.flops.mean_document_length`), which has ``spent`` that many seconds. Collective."""
    device = ranks.device
    mine = torch.tensor(
        [
            0.0 if result.loss is None else float(result.loss),
            float(result.loss is not None),
            result.p2p_bytes,
            peak_memory_bytes(device),
            document_length,
            stopping,
            saving,
            *spent,
        ],
        dtype=torch.float64,
        device=device,
    )
    rows = mine.new_empty(ranks.world_size, len(mine))
    dist.all_gather(list(rows), mine)
    columns = rows.T.tolist()
    loss, with_loss, p2p_bytes, memory, document_lengths, stop, is_saving, *of_time = columns
    peak = max(memory) if device.type == "cuda" else sum(memory)
    return StepTotals(
        loss=_mean_loss(ranks, loss, with_loss),
        p2p_bytes=int(sum(p2p_bytes)),
        memory_bytes=int(peak),
        document_length=sum(document_lengths) / len(document_lengths),
        stopping=any(stop),
        saving=any(is_saving),
        spent=tuple(map(tuple, of_time)),
    )
