from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attnres_train.config import load_config
from attnres_train.model.chunk import ModelChunk
from attnres_train.optim.groups import ParamRule, assign

CONFIGS = Path(__file__).parents[2] / "configs"
D, LAYERS, EXPERTS = 2304, 27, 256
MLA_LAYERS = {3, 7, 11, 15, 19, 23, 26}
MATRIX = ParamRule("muon", True)
DECAYED = ParamRule("adamw", True)
PLAIN = ParamRule("adamw", False)


def kda(p: str) -> dict[str, tuple[tuple[int, ...], ParamRule]]:
    return {
        **{f"{p}.{x}_proj.weight": ((4096, D), MATRIX) for x in "qkv"},
        **{f"{p}.{x}_conv1d.weight": ((4096, 1, 4), DECAYED) for x in "qkv"},
        f"{p}.A_log": ((1, 1, 32, 1), PLAIN),
        f"{p}.dt_bias": ((4096,), PLAIN),
        **{f"{p}.{x}_a_proj.weight": ((128, D), MATRIX) for x in "fg"},
        **{f"{p}.{x}_b_proj.weight": ((4096, 128), MATRIX) for x in "fg"},
        f"{p}.b_proj.weight": ((32, D), MATRIX),
        f"{p}.o_norm.weight": ((128,), DECAYED),
        f"{p}.o_proj.weight": ((D, 4096), MATRIX),
    }


def mla(p: str) -> dict[str, tuple[tuple[int, ...], ParamRule]]:
    return {
        f"{p}.q_proj.weight": ((6144, D), MATRIX),
        f"{p}.kv_a_proj_with_mqa.weight": ((576, D), MATRIX),
        f"{p}.kv_a_layernorm.weight": ((512,), DECAYED),
        f"{p}.kv_b_proj.weight": ((8192, 512), MATRIX),
        f"{p}.o_proj.weight": ((D, 4096), MATRIX),
    }


def swiglu(p: str, width: int) -> dict[str, tuple[tuple[int, ...], ParamRule]]:
    return {
        f"{p}.gate_proj.weight": ((width, D), MATRIX),
        f"{p}.up_proj.weight": ((width, D), MATRIX),
        f"{p}.down_proj.weight": ((D, width), MATRIX),
    }


def moe(p: str) -> dict[str, tuple[tuple[int, ...], ParamRule]]:
    return {
        f"{p}.gate.weight": ((EXPERTS, D), MATRIX),
        f"{p}.experts.w1": ((EXPERTS, 1024, D), MATRIX),
        f"{p}.experts.w3": ((EXPERTS, 1024, D), MATRIX),
        f"{p}.experts.w2": ((EXPERTS, D, 1024), MATRIX),
        **swiglu(f"{p}.shared_experts", 1024),
    }


def residual(p: str) -> dict[str, tuple[tuple[int, ...], ParamRule]]:
    return {f"{p}_proj.weight": ((1, D), DECAYED), f"{p}_norm.weight": ((D,), DECAYED)}


def kimi_linear_48b() -> dict[str, tuple[tuple[int, ...], ParamRule]]:
    """Every parameter of the released 48B checkpoint plus AttnRes, with the rule it must get."""
    table = {
        "embed_tokens.weight": ((163840, D), DECAYED),
        "lm_head.weight": ((163840, D), DECAYED),
        "norm.weight": ((D,), DECAYED),
        **residual("output_attn_res"),
    }
    for i in range(LAYERS):
        p = f"layers.{i}"
        table |= mla(f"{p}.self_attn") if i in MLA_LAYERS else kda(f"{p}.self_attn")
        table |= moe(f"{p}.block_sparse_moe") if i else swiglu(f"{p}.mlp", 9216)
        table |= residual(f"{p}.self_attention_res") | residual(f"{p}.mlp_res")
        for norm in ("input_layernorm", "post_attention_layernorm"):
            table[f"{p}.{norm}.weight"] = ((D,), DECAYED)
    return table


def meta(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def test_every_parameter_of_the_48b_model_has_its_rule():
    table = kimi_linear_48b()
    router_biases = 26 * 256
    elements = sum(meta(shape).numel() for shape, _ in table.values())
    assert elements + router_biases == 49_122_681_728 + 253_440
    assert {name: assign(name, meta(shape)) for name, (shape, _) in table.items()} == {
        name: rule for name, (_, rule) in table.items()
    }


def test_the_table_is_what_the_model_has():
    config = load_config(CONFIGS / "kimi_linear_48b_attnres.yaml", []).model
    chunk = ModelChunk(
        config, 0, config.num_layers, recompute="none", stream_dtype=None, device="meta"
    )
    shapes = {name: tuple(param.shape) for name, param in chunk.named_parameters()}
    assert shapes == {name: shape for name, (shape, _) in kimi_linear_48b().items()}


def test_adamw_takes_everything_and_decays_the_same_parameters():
    for name, (shape, rule) in kimi_linear_48b().items():
        assert assign(name, meta(shape), "adamw") == ParamRule("adamw", rule.weight_decay)


@pytest.mark.parametrize("name", ["layers.0.self_attn.new_proj.weight", "bias", "xnorm.weight"])
def test_an_unknown_parameter_is_an_error(name):
    with pytest.raises(ValueError, match="matches 0 rules"):
        assign(name, meta((4, 4)))


def test_a_muon_parameter_must_be_a_matrix():
    with pytest.raises(ValueError, match="is no matrix"):
        assign("layers.0.self_attn.q_proj.weight", meta((4,)))
