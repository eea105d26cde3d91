"""How a parameter is divided among the ranks of a stage, for planning."""

from __future__ import annotations

from attnres_train.model.parameters import ParameterRule

# By the last words of a name: maps to heads or to a width are split by rows, maps from them by
# columns, embedding and head by the vocabulary.
_ROWS = tuple(
    f"{name}.weight"
    for name in (
        *(f"self_attn.{x}_proj" for x in ("q", "k", "v", "f_b", "g_b", "b", "kv_b")),
        *(f"self_attn.{x}_conv1d" for x in ("q", "k", "v")),
        *(f"{x}_proj" for x in ("gate", "up")),
        "embed_tokens",
        "lm_head",
    )
)
_COLUMNS = ("self_attn.o_proj.weight", "down_proj.weight")


def split_axis(name: str, rule: ParameterRule) -> int | None:
    """The axis along which tensor-parallel ranks share parameter ``name``; None: each has all."""
    if rule.split is not None or rule.is_expert:
        return rule.split
    if name.endswith("A_log"):
        return 2
    if name.endswith((*_ROWS, "dt_bias")):
        return 0
    return 1 if name.endswith(_COLUMNS) else None


def local_shape(
    name: str, shape: tuple[int, ...], rule: ParameterRule, tensor: int, experts: int
) -> tuple[int, ...]:
    """The part of ``shape`` that a rank has where ``tensor`` ranks share split tensors (rounded
    up), and ``experts`` ranks the routed experts."""
    axis, ranks = (0, experts) if rule.is_expert else (split_axis(name, rule), tensor)
    if axis is None:
        return shape
    return (*shape[:axis], -(-shape[axis] // ranks), *shape[axis + 1 :])
