"""The configurations in ``configs/``: each loads, passes the checks and says what it claims to."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnres_train.config import ConfigError, check_config, load_config
from attnres_train.config.stages import stage_configs
from attnres_train.data.tokenizers.patterns import family
from attnres_train.model.blocks import Blocks

CONFIGS = Path(__file__).parents[2] / "configs"


VARIANTS = sorted(CONFIGS.glob("variants/*.yaml"))


@pytest.mark.parametrize(
    "path", [*sorted(CONFIGS.glob("*.yaml")), *VARIANTS], ids=lambda path: path.stem
)
def test_runs_under_its_own_name(path):
    config = load_config(path)
    # Kimi's own tokenizer is not ours to ship.
    files = not path.stem.startswith("kimi_")
    check_config(config, None, files=files)
    check_config(config, 2 * config.parallel.least_processes, files=files)
    assert config.run.name == path.stem


def test_comparison_differs_in_the_residual_only():
    kinds = ("standard", "full", "block")
    configs = [load_config(CONFIGS / f"compare_{kind}.yaml") for kind in kinds]
    assert [config.model.residual.kind for config in configs] == list(kinds)
    for config in configs:
        config.run.name = "same"
        config.model.residual.kind = "block"
    assert configs[0] == configs[1] == configs[2]
    assert configs[0].model == load_config(CONFIGS / "quickstart.yaml").model


def test_variants_differ_in_the_residual_only():
    block = load_config(CONFIGS / "compare_block.yaml")
    residuals = []
    for path in VARIANTS:
        config = load_config(path)
        residuals.append(config.model.residual)
        block.run.name, block.model.residual = config.run.name, config.model.residual
        assert config == block
    kinds = {residual.kind for residual in residuals}
    options = {key for residual in residuals for key in residual.variations}
    assert kinds == {"full", "block", "dense_former", "mhc_lite"}
    of_the_table = {"window", "query", "scores", "normalizer", "key_norm", "num_heads"}
    assert options == of_the_table | {"values", "block_sum"}
    assert {residual.norm_gate_rank for residual in residuals} == {None, 16}


# arXiv 2603.15031, Table 2: layers, heads, width, expert width, learning rate, batch, tokens.
TABLE_2 = {
    "194m": (12, 12, 896, 400, 2.99e-3, 192, 38.7e9),
    "241m": (13, 13, 960, 432, 2.80e-3, 256, 45.4e9),
    "296m": (14, 14, 1024, 464, 2.50e-3, 320, 62.1e9),
    "436m": (16, 16, 1168, 528, 2.20e-3, 384, 87.9e9),
    "528m": (17, 17, 1264, 560, 2.02e-3, 432, 119.0e9),
}


@pytest.mark.parametrize("size", TABLE_2)
def test_table_2(size):
    config = load_config(CONFIGS / f"table2_{size}.yaml")
    model, train = config.model, config.train
    layers, heads, width, expert, lr, batch, tokens = TABLE_2[size]
    assert (model.num_layers, model.hidden_size) == (layers, width)
    assert model.kda.num_heads == model.mla.num_heads == heads
    assert (model.kda.head_dim, model.mla.v_head_dim) == (128, 128)
    assert (model.moe.intermediate_size, model.intermediate_size) == (expert, 11 * expert)
    assert (model.moe.num_experts, model.moe.num_experts_per_token) == (256, 8)
    assert (config.optimizer.lr, train.global_batch_size, train.seq_length) == (lr, batch, 8192)
    assert train.train_iters == round(tokens / (batch * 8192))
    # The embedding, and 7 to 9 blocks: the paper's "N about 8".
    assert 8 <= Blocks(model.num_sublayers, model.block_size).num_blocks <= 10


def test_48b_has_the_released_numbers():
    model = load_config(CONFIGS / "kimi_linear_48b.yaml").model
    assert (model.hidden_size, model.num_layers, model.vocab_size) == (2304, 27, 163840)
    full = [layer + 1 for layer in range(27) if model.is_full_attention(layer)]
    assert full == [4, 8, 12, 16, 20, 24, 27]
    assert [layer for layer in range(27) if model.is_dense(layer)] == [0]
    assert (model.kda.num_heads, model.kda.head_dim, model.kda.short_conv_kernel_size) == (
        32,
        128,
        4,
    )
    mla = model.mla
    assert (mla.num_heads, mla.kv_lora_rank) == (32, 512)
    assert (mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.v_head_dim) == (128, 64, 128)
    moe = model.moe
    assert (moe.num_experts, moe.num_experts_per_token, moe.num_shared_experts) == (256, 8, 1)
    assert (moe.intermediate_size, model.intermediate_size) == (1024, 9216)
    assert (moe.routed_scaling_factor, model.norm_eps) == (2.446, 1e-5)
    assert model.residual.kind == "standard"


def test_48b_reads_the_tokenizer_that_it_was_made_for():
    config = load_config(CONFIGS / "kimi_linear_48b.yaml")
    kimi = family(config.data.tokenizer.pattern)
    assert kimi.special_tokens[config.data.tokenizer.eod] == 163585
    assert max(kimi.special_tokens.values()) + 1 == config.model.vocab_size
    # Nothing but the file is missing.
    with pytest.raises(ConfigError) as caught:
        check_config(config)
    (problem,) = caught.value.problems
    assert problem.startswith("data.tokenizer.path: there is no file tiktoken.model")


def test_48b_attnres_adds_the_residual_to_the_same_recipe():
    plain = load_config(CONFIGS / "kimi_linear_48b.yaml")
    config = load_config(CONFIGS / "kimi_linear_48b_attnres.yaml")
    assert Blocks(config.model.num_sublayers, config.model.block_size).num_blocks == 10
    assert config.train.global_batch_size * config.train.seq_length == 2**23
    config.model.residual, config.run.name = plain.model.residual, plain.run.name
    assert config == plain


def test_quickstart_is_an_interleaved_pipeline_on_two_processes():
    config = load_config(CONFIGS / "quickstart.yaml")
    assert config.parallel.model_parallel_size == 2
    assert config.parallel.num_chunks == 4
    assert config.model.residual.kind == "block"


def test_48b_in_stages_keeps_its_tokens_per_step():
    config = load_config(CONFIGS / "kimi_linear_48b_stages.yaml")
    pretrain, anneal, long = stage_configs(config)
    for stage in (pretrain, anneal, long):
        assert stage.train.global_batch_size * stage.train.seq_length == 2**23
    tokens = [stage.train.train_iters * 2**23 for stage in (pretrain, anneal, long)]
    assert [round(count / 1e9) for count in tokens] == [1000, 400, 60]
    rates = [stage.model.moe.bias_update_rate for stage in (pretrain, anneal, long)]
    assert rates == [1e-3, 0, 0]
    assert (pretrain.train.seq_length, long.train.seq_length) == (4096, 32768)
    plain = load_config(CONFIGS / "kimi_linear_48b_attnres.yaml")
    assert config.model == plain.model and config.parallel == plain.parallel
