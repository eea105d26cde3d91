from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from attnres_train.config import RunConfig, load_config
from attnres_train.config.model_schema import ResidualConfig
from attnres_train.model.batch import MicroBatch
from attnres_train.model.chunk import ModelChunk
from attnres_train.model.flops import (
    forward_flops_per_token,
    layer_costs,
    layer_flops_per_token,
)
from attnres_train.model.init import init_weights
from attnres_train.model.parameters import parameter_rules
from attnres_train.optim.build import build_optimizer
from attnres_train.planning.costs import CostModel

MODEL = {
    "hidden_size": 96,
    "num_layers": 6,
    "vocab_size": 512,
    "intermediate_size": 320,
    "residual": {"kind": "block", "block_size": 4},
    "kda": {"num_heads": 4, "head_dim": 32},
    "mla": {
        "num_heads": 4,
        "kv_lora_rank": 48,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
    },
    "moe": {"num_experts": 8, "num_experts_per_token": 2, "intermediate_size": 56},
}
DTYPES = {"fp32": torch.float32, "bf16_params": torch.bfloat16}


def tiny(precision: str = "fp32", recompute: str = "none") -> RunConfig:
    train = {"train_iters": 1, "seq_length": 128, "micro_batch_size": 2, "global_batch_size": 2}
    train |= {"precision": precision, "recompute": recompute}
    return RunConfig.model_validate({"model": MODEL, "train": train})


def build(config: RunConfig, first: int, last: int) -> ModelChunk:
    dtype = DTYPES[config.train.precision]
    recompute = config.train.recompute
    chunk = ModelChunk(config.model, first, last, recompute=recompute, dtype=dtype)
    init_weights(chunk, seed=0)
    return chunk


@pytest.mark.parametrize("residual", ["", "_attnres"])
def test_kimi_linear_48b_has_its_parameters_however_it_is_split(residual):
    whole = ["parallel.expert_model_parallel_size=1"]
    model = CostModel(load_config(f"configs/kimi_linear_48b{residual}.yaml", whole))
    router_biases = 26 * 256  # in the published count, but not trained by gradients
    expected = 49_122_681_728 - router_biases + (253_440 if residual else 0)
    for bounds in ((0, 27), (0, 1, 13, 26, 27)):
        chunks = [range(a, b) for a, b in pairwise(bounds)]
        assert sum(model.chunk(layers).parameters for layers in chunks) == expected


@pytest.mark.parametrize("precision", DTYPES)
def test_optimizer_bytes_are_those_of_the_optimizer(precision):
    config = tiny(precision)
    chunk = build(config, 0, 6)
    rules = parameter_rules(chunk)
    optimizer = build_optimizer(chunk.named_parameters(), rules, config.optimizer, "cpu")
    actual = sum(tensor.numel() * tensor.element_size() for *_, tensor in optimizer.state_tensors())
    planned = CostModel(config).chunk(range(6))
    assert planned.parameters == sum(parameter.numel() for parameter in chunk.parameters())
    # Decay parameters stay fp32 and need no master: some numbers per head, which the plan ignores.
    assert actual == pytest.approx(planned.optimizer_bytes, rel=1e-3)


def test_flops_add_up_to_the_models():
    config = tiny()
    model, tokens = CostModel(config), 2 * 128
    chunks = [model.chunk(range(2)), model.chunk(range(2, 6))]
    whole = sum(forward_flops_per_token(config.model, 128).values()) * tokens
    assert sum(chunk.forward_flops for chunk in chunks) == pytest.approx(whole)
    assert sum(chunk.backward_flops for chunk in chunks) == pytest.approx(2 * whole)
    rerun = CostModel(tiny(recompute="full")).chunk(range(2))
    assert rerun.backward_flops == pytest.approx(3 * rerun.forward_flops)
    reads = sum(layer_flops_per_token(config.model, i, 128)["depth_reads"] for i in range(2))
    again = CostModel(tiny(recompute="selective")).chunk(range(2))
    assert again.backward_flops == pytest.approx(2 * again.forward_flops + reads * tokens)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_balancing_uses_the_same_costs(recompute):
    config = tiny(recompute=recompute)
    chunks = [CostModel(config).chunk(range(i, i + 1)) for i in range(6)]
    expected = [(chunk.forward_flops + chunk.backward_flops) / (2 * 128) for chunk in chunks]
    assert layer_costs(config.model, 128, recompute) == pytest.approx(expected)


def saved_bytes(chunk: ModelChunk, config: RunConfig) -> int:
    """Distinct storages that a training forward keeps, besides parameters and blocks."""
    batch, length, dtype = 2, 128, DTYPES[config.train.precision]
    shape = (batch, length, config.model.hidden_size)
    count = chunk.plan.completed_before(2 * chunk.first_layer + 1)
    blocks = {i: torch.randn(shape, dtype=dtype, requires_grad=True) for i in range(count)}
    known = {t.untyped_storage().data_ptr() for t in (*chunk.parameters(), *blocks.values())}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage  # kept alive, so that no address is used twice
        return tensor

    tokens = torch.randint(512, (batch, length))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        chunk(MicroBatch(tokens, tokens, torch.ones(batch, length)), blocks, None)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("precision", DTYPES)
def test_activation_estimate_is_near_what_autograd_saves(precision, recompute):
    """Layers 2 to 4: KDA, MLA and KDA, without embedding and head."""
    config = tiny(precision, recompute)
    planned = CostModel(config).chunk(range(2, 5)).activation_bytes
    actual = saved_bytes(build(config, 2, 5), config)
    assert actual == pytest.approx(planned, rel=0.05)


@pytest.mark.parametrize("precision", DTYPES)
def test_what_selective_recomputation_saves(precision):
    """Per sublayer: the read, the norm's output and, in bf16, the norm's input in fp32."""
    saved = {
        mode: saved_bytes(build(config, 2, 5), config)
        for mode in ("none", "selective", "full")
        for config in [tiny(precision, mode)]
    }
    size, units = {"fp32": (4, 2), "bf16_params": (2, 4)}[precision]
    unit = 2 * 128 * 96 * size
    assert (saved["none"] - saved["selective"]) / 6 == pytest.approx(units * unit, rel=0.1)
    assert saved["full"] < 0.1 * saved["selective"]
    planned = CostModel(tiny(precision, "selective")).chunk(range(2, 5))
    assert planned.recompute_bytes == (units + 4) * unit  # one read, and phase 1 of a block


def test_recomputation_keeps_a_tensor_per_layer_at_most():
    config = tiny(recompute="full")
    planned = CostModel(config).chunk(range(2, 5))
    actual = saved_bytes(build(config, 2, 5), config)
    assert 0 < actual <= planned.activation_bytes == 3 * 2 * 128 * 96 * 4
    assert planned.recompute_bytes > planned.activation_bytes


@pytest.mark.parametrize(
    "residual", [{"kind": "dense_former"}, {"scores": "bias"}, {"kind": "mhc_lite"}]
)
def test_parameters_of_other_residuals(residual):
    config = tiny()
    config.model.residual = ResidualConfig(**{**MODEL["residual"], **residual})
    bounds = pairwise((0, 1, 4, 6))
    planned = sum(CostModel(config).chunk(range(a, b)).parameters for a, b in bounds)
    assert planned == sum(parameter.numel() for parameter in build(config, 0, 6).parameters())


def test_a_unit_of_hyper_connections_is_all_streams():
    config = tiny()
    narrow = CostModel(config).unit_bytes
    config.model.residual = ResidualConfig(kind="mhc_lite", num_streams=3)
    assert CostModel(config).unit_bytes == 3 * narrow
