"""Names, shapes and counts of the released Kimi-Linear-48B-A3B, on the meta device."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from attnres_train.config import load_config
from attnres_train.config.model_schema import ModelConfig
from attnres_train.model.chunk import ModelChunk
from attnres_train.model.naming import released_tensors
from attnres_train.model.parts import one_of

CONFIGS = Path(__file__).parents[2] / "configs"
MLA_LAYERS = (3, 7, 11, 15, 19, 23, 26)


def kimi_linear(residual: str) -> ModelConfig:
    return ModelConfig(
        hidden_size=2304, num_layers=27, vocab_size=163840, residual={"kind": residual}
    )


def saved_tensors(config: ModelConfig, bounds=(0, 27)) -> dict[str, torch.Size]:
    """Parameters and router biases, as a checkpoint of the released layout has them."""
    found = {}
    for first, last in pairwise(bounds):
        chunk = ModelChunk(config, first, last, device="meta")
        named = [*chunk.named_parameters(), *chunk.named_buffers()]
        tensors = [(n, t) for n, t in named if not n.endswith("tokens_per_expert")]
        for name, tensor in released_tensors(tensors):
            assert name not in found
            found[name] = tensor.shape
    return found


def released_table() -> dict[str, tuple[int, ...]]:
    """Every tensor of the released checkpoint, from its own table."""
    table: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (163840, 2304),
        "lm_head.weight": (163840, 2304),
        "model.norm.weight": (2304,),
    }
    kda = {f"{x}_proj.weight": (4096, 2304) for x in "qkv"}
    kda |= {f"{x}_conv1d.weight": (4096, 1, 4) for x in "qkv"}
    kda |= {"A_log": (1, 1, 32, 1), "dt_bias": (4096,), "b_proj.weight": (32, 2304)}
    kda |= {f"{x}_a_proj.weight": (128, 2304) for x in "fg"}
    kda |= {f"{x}_b_proj.weight": (4096, 128) for x in "fg"}
    kda |= {"o_norm.weight": (128,), "o_proj.weight": (2304, 4096)}
    mla = {"q_proj.weight": (6144, 2304), "kv_a_proj_with_mqa.weight": (576, 2304)}
    mla |= {"kv_a_layernorm.weight": (512,), "kv_b_proj.weight": (8192, 512)}
    mla |= {"o_proj.weight": (2304, 4096)}
    moe = {"gate.weight": (256, 2304), "gate.e_score_correction_bias": (256,)}
    for e in range(256):
        moe |= {f"experts.{e}.{w}.weight": (1024, 2304) for w in ("w1", "w3")}
        moe |= {f"experts.{e}.w2.weight": (2304, 1024)}
    moe |= {f"shared_experts.{x}_proj.weight": (1024, 2304) for x in ("gate", "up")}
    moe |= {"shared_experts.down_proj.weight": (2304, 1024)}
    dense = {"gate_proj.weight": (9216, 2304), "up_proj.weight": (9216, 2304)}
    dense |= {"down_proj.weight": (2304, 9216)}
    for i in range(27):
        layer = {"input_layernorm.weight": (2304,), "post_attention_layernorm.weight": (2304,)}
        attention = mla if i in MLA_LAYERS else kda
        layer |= {f"self_attn.{name}": shape for name, shape in attention.items()}
        mlp = ("block_sparse_moe", moe) if i else ("mlp", dense)
        layer |= {f"{mlp[0]}.{name}": shape for name, shape in mlp[1].items()}
        table |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return table


@pytest.fixture(scope="module")
def standard() -> dict[str, torch.Size]:
    return saved_tensors(kimi_linear("standard"))


def test_48b_is_the_released_checkpoint(standard):
    assert standard == released_table()
    assert len(standard) == 20_493
    # The published total counts the router biases, which are buffers here.
    assert sum(shape.numel() for shape in standard.values()) == 49_122_681_728


def test_attention_residuals_add_110_tensors(standard):
    added = saved_tensors(kimi_linear("block"), (0, 5, 13, 14, 27))
    for name in standard:
        del added[name]
    expected = {"model.output_attn_res_proj.weight": (1, 2304)}
    expected |= {"model.output_attn_res_norm.weight": (2304,)}
    for i in range(27):
        for kind in ("self_attention", "mlp"):
            expected[f"model.layers.{i}.{kind}_res_proj.weight"] = (1, 2304)
            expected[f"model.layers.{i}.{kind}_res_norm.weight"] = (2304,)
    assert added == expected
    assert len(added) == 110
    assert sum(shape.numel() for shape in added.values()) == 253_440


@pytest.mark.parametrize(
    ("file", "tensors", "elements"),
    [
        ("kimi_linear_48b.yaml", 20_493, 49_122_681_728),
        ("kimi_linear_48b_attnres.yaml", 20_603, 49_122_935_168),
    ],
)
def test_shipped_configs(file, tensors, elements):
    found = saved_tensors(load_config(CONFIGS / file, []).model)
    assert len(found) == tensors
    assert sum(shape.numel() for shape in found.values()) == elements


def test_a_part_of_a_stack_has_the_names_of_its_experts():
    stack, name = torch.arange(12.0).view(4, 3), "layers.7.block_sparse_moe.experts.w2"
    part = dict(released_tensors([(f"{name}[1:3 of 4]", stack[1:3])]))
    whole = dict(released_tensors([(name, stack)]))
    assert list(part) == list(whole)[1:3]
    assert all(torch.equal(view, whole[released]) for released, view in part.items())


def test_a_part_of_a_part_has_its_place_in_the_whole():
    """Rows 2 and 3 of the second half, which is here, of a table of ten."""
    places = {"embed_tokens.weight": one_of((5, 3), 0, 1, 2)}
    table, rows = torch.zeros(5, 3), torch.zeros(2, 3)
    named = [("embed_tokens.weight", table), ("embed_tokens.weight[2:4 of 5]", rows)]
    assert [name for name, _ in released_tensors(named, places=places)] == [
        "model.embed_tokens.weight[5:10 of 10]",
        "model.embed_tokens.weight[7:9 of 10]",
    ]


def test_expert_views_share_memory_with_the_stack():
    stack = torch.zeros(3, 4, 2)
    named = [("layers.7.block_sparse_moe.experts.w2", stack), ("lm_head.weight", torch.ones(1))]
    released = dict(released_tensors(named))
    assert list(released) == [
        *(f"model.layers.7.block_sparse_moe.experts.{e}.w2.weight" for e in range(3)),
        "lm_head.weight",
    ]
    released["model.layers.7.block_sparse_moe.experts.1.w2.weight"].fill_(5)
    assert stack.sum(dim=(1, 2)).tolist() == [0, 40, 0]
