"""config.json in the released format, and the 48B checkpoint: every name, shape, dtype and key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from attnres_train.checkpoint.huggingface_config import (
    check_same_model,
    left_unsaid,
    released_config,
)
from attnres_train.checkpoint.streaming import FILE_BYTES, in_groups
from attnres_train.commands.export import released_layout
from attnres_train.config import load_config
from attnres_train.config.model_schema import ModelConfig
from attnres_train.errors import UserError
from attnres_train.model.residual.kind import residual_kind
from tests.checkpoint.released import CONFIG, RUN
from tests.model.test_naming import CONFIGS, released_table

# moonshotai/Kimi-Linear-48B-A3B-Instruct, without token ids, auto_map and transformers_version
# (this package knows nothing of them) and with the context of a run.
RELEASED = {
    "architectures": ["KimiLinearForCausalLM"],
    "dtype": "bfloat16",
    "first_k_dense_replace": 1,
    "head_dim": 72,
    "hidden_act": "silu",
    "hidden_size": 2304,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "kv_lora_rank": 512,
    "linear_attn_config": {
        "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
        "head_dim": 128,
        "kda_layers": [1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15, 17, 18, 19, 21, 22, 23, 25, 26],
        "num_heads": 32,
        "short_conv_kernel_size": 4,
    },
    "mla_use_nope": True,
    "model_max_length": 4096,
    "model_type": "kimi_linear",
    "moe_intermediate_size": 1024,
    "moe_layer_freq": 1,
    "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid",
    "num_attention_heads": 32,
    "num_expert_group": 1,
    "num_experts": 256,
    "num_experts_per_token": 8,
    "num_hidden_layers": 27,
    "num_key_value_heads": 32,
    "num_nextn_predict_layers": 0,
    "num_shared_experts": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "routed_scaling_factor": 2.446,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "use_cache": True,
    "use_grouped_topk": True,
    "v_head_dim": 128,
    "vocab_size": 163840,
}


def model(name: str) -> ModelConfig:
    return load_config(CONFIGS / f"{name}.yaml", []).model


def said(model: ModelConfig, context_length: int) -> dict:
    return released_config(model, context_length, residual_kind(model).released())


def write(folder: Path, config: dict) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_48b_config_is_the_released_one(tmp_path):
    assert said(model("kimi_linear_48b"), 4096) == RELEASED
    with_blocks = RELEASED | {"attn_res_block_size": 3}
    assert said(model("kimi_linear_48b_attnres"), 4096) == with_blocks
    check_same_model(write(tmp_path, RELEASED), model("kimi_linear_48b"))
    check_same_model(write(tmp_path, with_blocks), model("kimi_linear_48b_attnres"))
    check_same_model(write(tmp_path, RELEASED), model("kimi_linear_48b_attnres"))


@pytest.mark.parametrize(
    ("name", "tensors", "elements"),
    [
        ("kimi_linear_48b", 20_493, 49_122_681_728),
        ("kimi_linear_48b_attnres", 20_603, 49_122_935_168),
    ],
)
def test_48b_layout(name, tensors, elements):
    """The dtypes of the table; fp32 values are 20 KDA layers' 32 + 4096."""
    layout = released_layout(model(name))
    shapes = {n: tuple(t.shape) for n, t in layout.items()}
    table = released_table()
    assert {n: shape for n, shape in shapes.items() if "_res_" not in n} == table
    assert len(layout) == tensors
    assert sum(t.numel() for t in layout.values()) == elements
    fp32 = [t for t in layout.values() if t.dtype == torch.float32]
    assert sum(t.numel() for t in fp32) == 20 * (32 + 4096)
    for i in range(27):
        attention = f"model.layers.{i}.self_attn"
        for decay in (f"{attention}.A_log", f"{attention}.dt_bias"):
            assert (decay in layout) == (i not in (3, 7, 11, 15, 19, 23, 26))
            assert decay not in layout or layout[decay].dtype == torch.float32
    others = {t.dtype for n, t in layout.items() if not n.endswith(("A_log", "dt_bias"))}
    assert others == {torch.bfloat16}


def test_48b_fills_as_many_files_as_were_released():
    layout = released_layout(model("kimi_linear_48b"))
    assert len(in_groups(layout, lambda name: layout[name].nbytes, FILE_BYTES)) == 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 32}, "hidden_size is 32, but model.hidden_size is 16"),
        ({"routed_scaling_factor": 1.0}, "but model.moe.routed_scaling_factor is 1.7"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06, but model.norm_eps is 1e-05"),
        ({"q_lora_rank": 1536}, "q_lora_rank is 1536, but here it is always null"),
        ({"model_type": "kimi_k3"}, 'model_type is "kimi_k3", but here it is always "kimi_linear"'),
        (
            {"attn_res_block_size": 2},
            "model.residual.block_size 4, but the config's is none",
        ),
        (
            {"linear_attn_config": CONFIG["linear_attn_config"] | {"num_heads": 4}},
            "linear_attn_config.num_heads is 4, but model.kda.num_heads is 3",
        ),
        (
            {"linear_attn_config": CONFIG["linear_attn_config"] | {"gate_lower_bound": -5.0}},
            "linear_attn_config.gate_lower_bound is -5.0, but model.kda.gate is softplus (null)",
        ),
        (
            {"linear_attn_config": {"kda_layers": [0, 1, 3], "full_attn_layers": [5, 3]}},
            "linear_attn_config.kda_layers is [0, 1, 3], but the config makes it [1, 2, 4]",
        ),
    ],
)
def test_each_difference_is_named(tmp_path, changes, message):
    with pytest.raises(UserError) as error:
        check_same_model(write(tmp_path, CONFIG | changes), ModelConfig(**RUN["model"]))
    header, *problems = str(error.value).splitlines()
    assert header == f"{tmp_path / 'config.json'} describes another model than the config:"
    assert len(problems) == 1
    assert message in problems[0]


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"config\.json cannot be read \(No such file"):
        check_same_model(tmp_path, ModelConfig(**RUN["model"]))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        check_same_model(tmp_path, ModelConfig(**RUN["model"]))


def test_block_sizes_the_key_cannot_say():
    full = ModelConfig(**RUN["model"] | {"residual": {"kind": "full"}})
    with pytest.raises(UserError, match="blocks of 1 sublayers"):
        said(full, 32)


def test_the_gate_with_a_lower_bound_is_said(tmp_path):
    kda = RUN["model"]["kda"] | {"gate": "lower_bound", "gate_lower_bound": -4.0}
    bounded = ModelConfig(**RUN["model"] | {"kda": kda})
    config = said(bounded, 32)
    assert config["linear_attn_config"]["gate_lower_bound"] == -4.0
    check_same_model(write(tmp_path, config), bounded)
    with pytest.raises(UserError, match=r"gate_lower_bound is null, .* lower_bound \(-4\.0\)"):
        check_same_model(write(tmp_path, CONFIG), bounded)


def test_what_config_json_leaves_unsaid_is_noted():
    same = model("kimi_linear_48b_attnres")
    assert left_unsaid(same, residual_kind(same).unsaid()) == []
    residual = {"kind": "block", "block_size": 4}
    changed = ModelConfig(**RUN["model"] | {"norm_eps": 1e-6, "residual": residual})
    notes = left_unsaid(changed, residual_kind(changed).unsaid())
    assert [note.partition(" is ")[0] for note in notes] == [
        "model.mla.kv_norm_eps",
        "model.residual.norm_eps",
    ]
