"""Which optimizer updates which parameter: Muon for matrices, AdamW for everything else.

The choice is made by name, not by shape, because a shape says too little: a pseudo-query [1, D] is
a vector, a convolution [C, 1, 4] a set of filters, and stacked experts [E, F, D] are E matrices. An
unknown name is an error and not a guess.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

_PROJECTIONS = "[qkvo]_proj|[fg]_[ab]_proj|b_proj|kv_a_proj_with_mqa|kv_b_proj"

# Each parameter of a chunk matches exactly one row. Moonlight (arXiv 2502.16982, section 2.2 and
# appendix D) gives embeddings, head and norms to AdamW, norms with weight decay.
_RULES: tuple[tuple[str, str, bool], ...] = (
    (rf"self_attn\.({_PROJECTIONS})\.weight", "muon", True),
    (r"(mlp|shared_experts)\.(gate|up|down)_proj\.weight", "muon", True),
    (r"block_sparse_moe\.gate\.weight", "muon", True),
    (r"block_sparse_moe\.experts\.w[123]", "muon", True),
    (r"(embed_tokens|lm_head)\.weight", "adamw", True),
    (r"(\w+_layernorm|norm|o_norm|\w+_res_norm)\.weight", "adamw", True),
    (r"\w+_res_(proj|gates)\.weight", "adamw", True),
    (r"\w+_res_query\.weight", "muon", True),
    (r"\w+_res_(scores|weights|gates\.bias|gate_scales)", "adamw", False),
    (r"self_attn\.[qkv]_conv1d\.weight", "adamw", True),
    (r"self_attn\.(A_log|dt_bias)", "adamw", False),
)


@dataclass(frozen=True)
class ParamRule:
    """How one parameter is updated: by ``kind``, with or without weight decay."""

    kind: Literal["muon", "adamw"]
    weight_decay: bool


def assign(name: str, tensor: Tensor, optimizer: Literal["muon", "adamw"] = "muon") -> ParamRule:
    """The rule for chunk parameter ``name`` (e.g. ``layers.3.self_attn.q_proj.weight``).

    Muon takes matrices [A, B] and stacks of them [E, A, B]. With ``optimizer="adamw"`` every
    parameter is AdamW's; weight decay stays as it is. Raises ValueError for a name without a rule,
    or with two, and for a Muon parameter that is no matrix: mistakes of whoever adds a module.
    """
    rules = [rule for rule in _RULES if re.search(rf"(^|\.){rule[0]}$", name)]
    if len(rules) != 1:
        raise ValueError(
            f"parameter {name!r} matches {len(rules)} rules in optim/groups.py, not one"
        )
    _, kind, weight_decay = rules[0]
    if kind == "muon" and tensor.ndim not in (2, 3):
        raise ValueError(f"Muon parameter {name!r} is no matrix: shape {tuple(tensor.shape)}")
    return ParamRule("adamw" if optimizer == "adamw" else kind, weight_decay)
