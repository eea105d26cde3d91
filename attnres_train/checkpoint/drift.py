"""Whether data-parallel replicas are still equal, bit for bit, by a checksum of every tensor."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

# Odd, so that its products with what differs are never zero.
_FACTOR = 0x9E3779B97F4A7C15 - 2**64
_CHUNK = 2**22
_AS_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Tensors that are compared by rank once some differ.
_NAMED = 100


@torch.no_grad()
def digests(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """One int64 per tensor, on ``device``: sum over elements x_i, taken as integers, of
    x_i (2 i + 1) K modulo 2^64, K odd. Another value of any one element gives another digest."""
    return torch.stack([_digest(tensor).to(device) for tensor in tensors])


def _digest(tensor: Tensor) -> Tensor:
    flat = tensor.detach().contiguous().view(-1).view(_AS_INTEGER[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, len(flat), _CHUNK):
        part = flat[start : start + _CHUNK]
        odd = torch.arange(start, start + len(part), device=flat.device).mul_(2).add_(1)
        total += odd.mul_(_FACTOR).mul_(part).sum()
    return total


def drifted(
    tensors: dict[str, Tensor], group: dist.ProcessGroup, device: torch.device
) -> dict[str, list[int]]:
    """Names of ``tensors`` of which replicas in ``group`` hold other bytes than its first rank, and
    the global ranks that do; the first `_NAMED` of them. Collective over ``group``, which moves
    what is on ``device``; all its ranks pass the same names in the same order, and get the same."""
    if group.size() == 1:
        return {}
    mine = digests(tensors.values(), device)
    # The largest and, as ~x = -x - 1, the smallest by one reduction.
    ends = torch.stack([mine, ~mine])
    dist.all_reduce(ends, dist.ReduceOp.MAX, group=group)
    differing = (ends[0] != ~ends[1]).nonzero().flatten()[:_NAMED]
    if not len(differing):
        return {}
    rows = [torch.empty_like(mine[differing]) for _ in range(group.size())]
    dist.all_gather(rows, mine[differing].contiguous(), group=group)
    names, ranks = list(tensors), dist.get_process_group_ranks(group)
    return {
        names[index]: [
            rank for rank, row in zip(ranks, rows, strict=True) if row[place] != rows[0][place]
        ]
        for place, index in enumerate(differing.tolist())
    }


def told(by_stage: Iterable[dict[str, list[int]]], step: int, shown: int = 5) -> str | None:
    """What `drifted` found of all stages, in a sentence; None where that is nothing."""
    found = {name: ranks for mine in by_stage for name, ranks in mine.items()}
    if not found:
        return None
    lines = [f"{name} on rank {', '.join(map(str, r))}" for name, r in list(found.items())[:shown]]
    more = f" and {len(found) - shown} more tensors" if len(found) > shown else ""
    return (
        f"after step {step} replicas of the model differ, compared with the first one: "
        f"{'; '.join(lines)}{more}. The run goes on; a device or link of these ranks may be faulty"
    )
