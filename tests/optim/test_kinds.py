"""Which optimizer updates which parameter, and how."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from attnres_train.config import load_config
from attnres_train.config.schema import OptimizerConfig
from attnres_train.model.chunk import ModelChunk
from attnres_train.model.parameters import ParameterRule, constant, parameter_rules
from attnres_train.optim.build import build_optimizer
from attnres_train.optim.kinds import Part, optimizer_kind

CONFIGS = Path(__file__).parents[2] / "configs"
D, LAYERS, EXPERTS = 2304, 27, 256
MLA_LAYERS = {3, 7, 11, 15, 19, 23, 26}
MATRIX = Part("muon", 0.1)
ROWS, COLUMNS = Part("muon", 0.1, split=-2), Part("muon", 0.1, split=-1)
"""Matrices that tensor-parallel ranks share."""
DECAYED = Part("adamw", 0.1)
PLAIN = Part("adamw", 0.0)


def kda(p: str) -> dict[str, tuple[tuple[int, ...], Part]]:
    return {
        **{f"{p}.{x}_proj.weight": ((4096, D), ROWS) for x in "qkv"},
        **{f"{p}.{x}_conv1d.weight": ((4096, 1, 4), DECAYED) for x in "qkv"},
        f"{p}.A_log": ((1, 1, 32, 1), PLAIN),
        f"{p}.dt_bias": ((4096,), PLAIN),
        **{f"{p}.{x}_a_proj.weight": ((128, D), MATRIX) for x in "fg"},
        **{f"{p}.{x}_b_proj.weight": ((4096, 128), ROWS) for x in "fg"},
        f"{p}.b_proj.weight": ((32, D), ROWS),
        f"{p}.o_norm.weight": ((128,), DECAYED),
        f"{p}.o_proj.weight": ((D, 4096), COLUMNS),
    }


def mla(p: str) -> dict[str, tuple[tuple[int, ...], Part]]:
    return {
        f"{p}.q_proj.weight": ((6144, D), ROWS),
        f"{p}.kv_a_proj_with_mqa.weight": ((576, D), MATRIX),
        f"{p}.kv_a_layernorm.weight": ((512,), DECAYED),
        f"{p}.kv_b_proj.weight": ((8192, 512), ROWS),
        f"{p}.o_proj.weight": ((D, 4096), COLUMNS),
    }


def swiglu(p: str, width: int) -> dict[str, tuple[tuple[int, ...], Part]]:
    return {
        f"{p}.gate_proj.weight": ((width, D), ROWS),
        f"{p}.up_proj.weight": ((width, D), ROWS),
        f"{p}.down_proj.weight": ((D, width), COLUMNS),
    }


def moe(p: str) -> dict[str, tuple[tuple[int, ...], Part]]:
    return {
        f"{p}.gate.weight": ((EXPERTS, D), MATRIX),
        f"{p}.experts.w1": ((EXPERTS, 1024, D), MATRIX),
        f"{p}.experts.w3": ((EXPERTS, 1024, D), MATRIX),
        f"{p}.experts.w2": ((EXPERTS, D, 1024), MATRIX),
        **swiglu(f"{p}.shared_experts", 1024),
    }


def residual(p: str) -> dict[str, tuple[tuple[int, ...], Part]]:
    return {f"{p}_proj.weight": ((1, D), DECAYED), f"{p}_norm.weight": ((D,), DECAYED)}


def kimi_linear_48b() -> dict[str, tuple[tuple[int, ...], Part]]:
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


def elements(shape: tuple[int, ...]) -> int:
    return math.prod(shape)


@pytest.fixture(scope="module")
def chunk() -> ModelChunk:
    config = load_config(CONFIGS / "kimi_linear_48b_attnres.yaml", []).model
    return ModelChunk(
        config, 0, config.num_layers, recompute="none", stream_dtype=None, device="meta"
    )


def parts(chunk: ModelChunk, **optimizer) -> dict[str, Part]:
    kind, rules = optimizer_kind(OptimizerConfig(**optimizer)), parameter_rules(chunk)
    return {n: kind.part(n, tuple(p.shape), rules[n]) for n, p in chunk.named_parameters()}


def test_every_parameter_of_the_48b_model_has_its_part(chunk):
    table = kimi_linear_48b()
    router_biases = 26 * 256
    total = sum(elements(shape) for shape, _ in table.values())
    assert total + router_biases == 49_122_681_728 + 253_440
    assert parts(chunk) == {name: part for name, (_, part) in table.items()}


def test_the_table_is_what_the_model_has(chunk):
    shapes = {name: tuple(param.shape) for name, param in chunk.named_parameters()}
    assert shapes == {name: shape for name, (shape, _) in kimi_linear_48b().items()}


def test_adamw_takes_everything_and_decays_the_same_parameters(chunk):
    assert parts(chunk, kind="adamw", weight_decay=0.3) == {
        name: Part("adamw", 0.3 if part.weight_decay else 0.0)
        for name, (_, part) in kimi_linear_48b().items()
    }


def test_a_parameter_without_a_rule_is_an_error():
    params = {"norm.weight": torch.ones(4), "xnorm.weight": torch.ones(4)}
    rules = {"norm.weight": ParameterRule(constant(1.0))}
    with pytest.raises(ValueError, match=r"'xnorm\.weight' has no rule"):
        build_optimizer(params.items(), rules, OptimizerConfig(), "cpu")


@pytest.mark.parametrize("shape", [(4,), (2, 2, 4, 4)])
def test_a_muon_parameter_must_be_a_matrix(shape):
    rule = ParameterRule(constant(0.0), is_matrix=True)
    with pytest.raises(ValueError, match="'q' is no matrix"):
        optimizer_kind(OptimizerConfig()).part("q", shape, rule)
    assert optimizer_kind(OptimizerConfig(kind="adamw")).part("q", shape, rule) == DECAYED


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_the_states_that_are_declared_are_those_that_there_are(kind):
    shapes = {"matrix": (4, 6), "vector": (6,)}
    params = {name: torch.ones(shape) for name, shape in shapes.items()}
    rules = {n: ParameterRule(constant(0.0), is_matrix=n == "matrix") for n in shapes}
    section = OptimizerConfig(kind=kind)
    optimizer = build_optimizer(params.items(), rules, section, "cpu")
    declared = optimizer_kind(section)
    expected = [
        (name, key)
        for name, shape in shapes.items()
        for key in declared.states(declared.part(name, shape, rules[name]))
    ]
    assert [(name, key) for name, key, _ in optimizer.state_tensors()] == expected
    assert len(expected) == (3 if kind == "muon" else 4)


def test_summaries():
    assert optimizer_kind(OptimizerConfig()).summary() == (
        "muon: Muon for matrices, AdamW for the rest; weight decay 0.1, betas 0.9 and 0.95, "
        "momentum 0.95"
    )
    assert optimizer_kind(OptimizerConfig(kind="adamw", weight_decay=0)).summary() == (
        "adamw: AdamW for every parameter; weight decay 0, betas 0.9 and 0.95"
    )
