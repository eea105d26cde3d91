"""What the update of a parameter costs, for ownership among replicas (`parallel.ownership`)."""

from __future__ import annotations

from math import prod

from attnres_train.model.parameters import ParameterRule
from attnres_train.optim.kinds import OptimizerKind
from attnres_train.parallel.ownership import Update

_FP32 = 4


def update_of(
    kind: OptimizerKind,
    name: str,
    shape: tuple[int, ...],
    rule: ParameterRule,
    has_master: bool,
    tensor_ranks: int = 1,
) -> Update:
    """Of the parameter ``name``, of which this rank has ``shape``. The experts of a stack have an
    owner each, and so have the rows of what is updated element by element. A matrix that
    ``tensor_ranks`` share is updated whole by one of them: each has that part of the work."""
    part = kind.part(name, shape, rule)
    tensors = len(kind.states(part)) + has_master
    is_stack = rule.is_matrix and len(shape) == 3
    work = kind.work(part, shape)
    if part.split is not None and tensor_ranks > 1:
        axis = len(shape) + part.split
        wide = (*shape[:axis], shape[axis] * tensor_ranks, *shape[axis + 1 :])
        work = kind.work(part, wide) / tensor_ranks
    return Update(
        parts=shape[0] if shape and (is_stack or kind.is_elementwise(part)) else 1,
        work=work,
        state_bytes=_FP32 * tensors * prod(shape),
    )
