"""What the update of a parameter costs, for ownership among replicas (`parallel.ownership`)."""

from __future__ import annotations

from math import prod

from attnres_train.model.parameters import ParameterRule
from attnres_train.optim.kinds import OptimizerKind
from attnres_train.parallel.ownership import Update

_FP32 = 4


def update_of(
    kind: OptimizerKind, name: str, shape: tuple[int, ...], rule: ParameterRule, has_master: bool
) -> Update:
    """Of the parameter ``name`` of ``shape``. The experts of a stack are matrices each."""
    part = kind.part(name, shape, rule)
    tensors = len(kind.states(part)) + has_master
    return Update(
        matrices=shape[0] if rule.is_matrix and len(shape) == 3 else 1,
        work=kind.work(part, shape),
        state_bytes=_FP32 * tensors * prod(shape),
    )
