"""Replicas begin alike: what data-parallel rank 0 has is what all of them have."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from attnres_train.model.parameters import ParameterRule
from attnres_train.parallel.flat import Flat
from attnres_train.parallel.gradients import in_buckets
from attnres_train.parallel.ranks import Ranks


@dataclass(frozen=True)
class Replicated:
    """Parameters of this rank whose replicas are on the same ranks."""

    parameters: list[Tensor]
    replicas: ProcessGroup


def by_replicas(
    rules: Iterable[tuple[Tensor, ParameterRule | None]], ranks: Ranks
) -> list[Replicated]:
    """(parameter, rule) pairs, and (buffer, None), by who holds their replicas, in their order."""
    found: dict[ProcessGroup, Replicated] = {}
    for parameter, rule in rules:
        group = ranks.stage if rule is None else ranks.replicas(rule)
        found.setdefault(group, Replicated([], group)).parameters.append(parameter)
    return list(found.values())


def broadcast_from_first(tensors: Iterable[Tensor], group: ProcessGroup) -> None:
    """Give every rank of the data-parallel ``group`` the first one's values of ``tensors``, in
    place, in flat buckets. All ranks pass tensors of the same shapes and dtypes, in one order.

    Initial weights are drawn on every rank, but their last bits depend on the CPU (its vector
    instructions): machines of several kinds would begin with different models.
    """
    if group.size() == 1:
        return
    source = dist.get_global_rank(group, 0)
    for bucket in in_buckets(list(tensors)):
        flat = Flat(bucket)
        dist.broadcast(flat.values, source, group=group)
        flat.unpack()
