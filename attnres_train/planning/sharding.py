"""How a parameter is divided among the ranks of a stage, for planning."""

from __future__ import annotations

from attnres_train.model.parameters import ParameterRule


def local_shape(
    shape: tuple[int, ...], rule: ParameterRule, tensor: int, experts: int
) -> tuple[int, ...]:
    """The part of ``shape`` that a rank has where ``tensor`` ranks share split tensors (rounded
    up), and ``experts`` ranks the routed experts."""
    axis, ranks = (0, experts) if rule.is_expert else (rule.split, tensor)
    if axis is None:
        return shape
    return (*shape[:axis], -(-shape[axis] // ranks), *shape[axis + 1 :])
