"""The residuals that the paper compares with: each equals its formula, in any chunks."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from attnres_train.config import load_config
from attnres_train.config.model_schema import ModelConfig
from attnres_train.config.schema import OptimizerConfig
from attnres_train.model.chunk import ModelChunk
from attnres_train.model.flops import forward_flops_per_token
from attnres_train.model.init import init_weights
from attnres_train.model.parameters import parameter_rules
from attnres_train.model.residual.hyper_connections import Gates
from attnres_train.optim.build import build_optimizer
from attnres_train.optim.kinds import optimizer_kind
from tests.model.residual.reference import final_state, normed
from tests.model.tiny import (
    assert_same_gradients,
    build,
    gradients,
    random_batch,
    run_split,
    tiny_config,
)

ATTENTION = {
    "window": {"window": 3},
    "narrow_window": {"window": 1},
    "input_query": {"query": "input"},
    "bias": {"scores": "bias"},
    "sigmoid": {"normalizer": "sigmoid"},
    "no_key_norm": {"key_norm": False},
    "heads": {"num_heads": 4},
    "heads_input_query": {"num_heads": 2, "query": "input", "key_norm": False},
    "keys_as_values": {"values": "key"},
    "unit_sums": {"block_sum": "unit_outputs"},
    "unit_sums_window_heads": {"block_sum": "unit_outputs", "window": 2, "num_heads": 2},
    "unit_sums_bias": {"block_sum": "unit_outputs", "scores": "bias"},
    "gates_keys_heads": {"norm_gate_rank": 2, "values": "key", "num_heads": 2},
    "gates_two_phase": {"norm_gate_rank": 3},
    "heads_bias_window_sigmoid": {
        "num_heads": 2,
        "scores": "bias",
        "window": 2,
        "normalizer": "sigmoid",
    },
}
CASES = {
    **{f"full-{name}": ("full", 1, options) for name, options in ATTENTION.items()},
    **{f"block-{name}": ("block", 3, options) for name, options in ATTENTION.items()},
    "standard-gates": ("standard", 1, {"norm_gate_rank": 3}),
    "dense_former": ("dense_former", 1, {}),
    "mhc_lite": ("mhc_lite", 1, {}),
    "mhc_lite-3": ("mhc_lite", 1, {"num_streams": 3}),
}
VARIANTS = sorted(Path(__file__).parents[2].glob("configs/variants/*.yaml"))
RESIDUAL = ("_res_", "attn_res_", "norm.gate_")


@pytest.fixture(params=CASES, scope="module")
def config(request) -> ModelConfig:
    kind, block_size, options = CASES[request.param]
    return tiny_config(kind, block_size, residual=options)


def chunks_of(config: ModelConfig, *bounds: int, **options) -> list[ModelChunk]:
    """fp64 chunks whose residuals are far from their initial state."""
    chunks = [build(config, *pair, dtype=torch.float64, **options) for pair in pairwise(bounds)]
    with torch.no_grad():
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                if any(part in name for part in RESIDUAL):
                    rng = torch.Generator().manual_seed(sum(name.encode()))
                    shift = torch.randn(parameter.shape, generator=rng, dtype=parameter.dtype)
                    parameter.add_(0.5 * shift)
    return chunks


def loss_and_gradients(chunks: list[ModelChunk]):
    loss = run_split(chunks, random_batch()).loss
    loss.backward()
    return loss.detach(), gradients(chunks)


def test_equals_its_formula(config):
    chunks = chunks_of(config, 0, 5)
    loss, grads = loss_and_gradients(chunks)

    (chunk,) = chunks_of(config, 0, 5)
    batch = random_batch()
    state = normed(chunk.norm, final_state(chunk, chunk.embed_tokens(batch.tokens)))
    each = F.cross_entropy(
        chunk.lm_head(state).flatten(0, 1), batch.labels.flatten(), reduction="none"
    )
    mask = batch.loss_mask.double().flatten()
    expected = (each * mask).sum() / mask.sum()
    expected.backward()

    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
    assert_same_gradients(gradients([chunk]), grads, rtol=1e-9, floor=1e-4)


def test_split_model_equals_the_whole(config):
    loss, grads = loss_and_gradients(chunks_of(config, 0, 5))
    split_loss, split_grads = loss_and_gradients(chunks_of(config, 0, 1, 2, 3, 4, 5))
    torch.testing.assert_close(split_loss, loss, rtol=1e-13, atol=0)
    assert_same_gradients(grads, split_grads, rtol=1e-10, floor=1e-4)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_nothing(config, recompute):
    loss, grads = loss_and_gradients(chunks_of(config, 0, 2, 5))
    again_loss, again = loss_and_gradients(chunks_of(config, 0, 2, 5, recompute=recompute))
    torch.testing.assert_close(again_loss, loss, rtol=1e-13, atol=0)
    assert_same_gradients(grads, again, rtol=1e-10, floor=1e-4)


def test_every_block_that_a_chunk_reads_gets_a_gradient(config):
    """The pipeline counts on it, even of blocks outside of a window."""
    first, second = chunks_of(config, 0, 3, 5)
    made = first(random_batch(), {}, None)
    tensors = [*made.blocks.values(), *([] if made.partial is None else [made.partial])]
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    blocks = dict(zip(made.blocks, leaves, strict=False))
    partial = None if made.partial is None else leaves[-1]
    second(random_batch(), blocks, partial).loss.backward()
    assert leaves
    assert all(leaf.grad is not None for leaf in leaves)


def test_every_parameter_has_its_optimizer_and_its_initial_value(config):
    chunk = ModelChunk(config, 0, 5)
    init_weights(chunk, seed=1)
    rules, kind = parameter_rules(chunk), optimizer_kind(OptimizerConfig(weight_decay=0.5))
    for name, parameter in chunk.named_parameters():
        part = kind.part(name, tuple(parameter.shape), rules[name])
        if name.endswith(("_res_query.weight", "gate_down", "gate_up")):
            assert part.optimizer == "muon"
        elif any(place in name for place in RESIDUAL):
            assert part.optimizer == "adamw"
            assert part.weight_decay == 0.5 * name.endswith(".weight")
        assert parameter.isfinite().all()


def test_bf16_stays_near(config):
    chunks = chunks_of(config, 0, 2, 5)
    expected = run_split(chunks, random_batch()).loss
    low = [chunk.to(torch.bfloat16) for chunk in chunks]
    for chunk in low:
        chunk.autocast_dtype = torch.bfloat16
    torch.testing.assert_close(
        run_split(low, random_batch()).loss.double(), expected, rtol=0.1, atol=0
    )


def test_windows_as_wide_as_the_model_change_nothing():
    narrow, wide = ({"window": 10, "two_phase": False}, {"two_phase": False})
    for kind in ("full", "block"):
        loss, grads = loss_and_gradients(chunks_of(tiny_config(kind, residual=narrow), 0, 5))
        plain, expected = loss_and_gradients(chunks_of(tiny_config(kind, residual=wide), 0, 5))
        torch.testing.assert_close(loss, plain, rtol=1e-13, atol=0)
        assert_same_gradients(grads, expected, rtol=1e-10, floor=1e-4)


def test_untrained_dense_former_is_the_standard_residual():
    losses = []
    for kind in ("dense_former", "standard"):
        chunk = ModelChunk(tiny_config(kind), 0, 5, dtype=torch.float64)
        init_weights(chunk, seed=3)
        losses.append(chunk(random_batch(), {}, None).loss)
    torch.testing.assert_close(*losses, rtol=1e-13, atol=0)


def test_mixing_of_streams_is_doubly_stochastic():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 8, generator=rng, dtype=torch.float64)
    weight = torch.randn(32, 32, generator=rng, dtype=torch.float64)
    bias = torch.randn(32, generator=rng, dtype=torch.float64)
    pre, post, mixing = Gates(weight, bias, torch.ones(3, dtype=torch.float64), 1e-5)(x)
    one = torch.ones(2, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(mixing.sum(-1), one)
    torch.testing.assert_close(mixing.sum(-2), one)
    assert mixing.min() >= 0
    assert (pre > 0).logical_and(pre < 1).all()
    assert (post > 0).logical_and(post < 2).all()


def test_untrained_streams_hardly_mix_and_take_turns():
    chunk = ModelChunk(tiny_config("mhc_lite"), 0, 5, dtype=torch.float64)
    init_weights(chunk, seed=3)
    x = torch.randn(1, 1, 4, 16, dtype=torch.float64)
    homes = []
    for layer in chunk.layers.values():
        for _, gates in sorted(layer.depth_readers().items()):
            pre, post, mixing = gates(x)
            assert (mixing - torch.eye(4, dtype=torch.float64)).abs().max() < 0.01
            assert pre.argmax() == post.argmax()
            homes.append(pre.argmax().item())
    assert homes == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]


def depth_reads(kind: str, block_size: int = 3, **residual) -> float:
    config = tiny_config(kind, block_size, residual=residual)
    return forward_flops_per_token(config, seq_length=20)["depth_reads"]


def test_flops():
    """Hidden size 16, ten sublayers; blocks of three have the sources 1, 2, 2, 2, 3, ... and 5."""
    sources, windowed = 1 + 3 * 2 + 3 * 3 + 3 * 4 - 4 + 4 + 5, 1 + 9 * 2 + 2
    assert sources == sum([1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5])
    assert depth_reads("block", normalizer="sigmoid") == 6 * 16 * sources
    assert depth_reads("block", num_heads=4) == 6 * 16 * sources
    assert depth_reads("block", window=1) == 6 * 16 * windowed
    assert depth_reads("block", key_norm=False) == 4 * 16 * sources
    assert depth_reads("block", scores="bias") == 2 * 16 * sources
    assert depth_reads("block", values="key") == 6 * 16 * sources
    assert depth_reads("block", block_sum="unit_outputs") == 6 * 16 * sources + 10 * 4 * 16
    assert depth_reads("block", query="input") == 6 * 16 * sources + 11 * 2 * 16 * 16
    assert depth_reads("full", window=8) == 6 * 16 * (sum(range(1, 10)) + 9 + 9)
    assert depth_reads("dense_former") == 2 * 16 * (2 + 3 + 4 + 5 + 6)
    gates, mixing = 2 * 64 * (4 + 4 + 24), 2 * 4 * 4 * 16
    assert depth_reads("mhc_lite") == 10 * (gates + mixing + 2 * 64 + 2 * 64) + 64


@pytest.mark.parametrize("path", VARIANTS, ids=lambda path: path.stem)
def test_configurations_take_a_step(path):
    config = load_config(path, ["model.vocab_size=64"])
    chunks = [ModelChunk(config.model, *layers) for layers in ((0, 3), (3, 8))]
    for chunk in chunks:
        init_weights(chunk, seed=1)
    named = {name: p for chunk in chunks for name, p in chunk.named_parameters()}
    learned = {name: p.detach().clone() for name, p in named.items() if "_res_" in name}
    rules = {name: rule for chunk in chunks for name, rule in parameter_rules(chunk).items()}
    optimizer = build_optimizer(named.items(), rules, config.optimizer, "cpu")
    loss = run_split(chunks, random_batch(samples=1, length=8)).loss
    loss.backward()
    optimizer.step(lr=0.01)
    assert abs(loss.item() - math.log(64)) < 0.1
    assert learned
    assert (
        sum(not torch.equal(named[name], old) for name, old in learned.items()) > len(learned) / 3
    )
