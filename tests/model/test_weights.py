"""Initial weights: a function of seed and released name, of nothing else."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from attnres_train.model.chunk import ModelChunk
from attnres_train.model.init import init_weights
from attnres_train.model.naming import released_tensors
from attnres_train.model.parameters import ParameterRule, constant, parameter_rules
from tests.model.tiny import tiny_config


def weights(config, bounds, seed=5, **options) -> dict[str, torch.Tensor]:
    found = {}
    for first, last in pairwise(bounds):
        chunk = ModelChunk(config, first, last, **options)
        if options.get("device") == "meta":
            chunk = chunk.to_empty(device="cpu")
        init_weights(chunk, seed)
        found |= released_tensors((n, p.detach()) for n, p in chunk.named_parameters())
    return found


def assert_equal(left, right) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())


def test_layout_does_not_matter():
    config = tiny_config()
    whole = weights(config, [0, 5])
    assert_equal(whole, weights(config, [0, 1, 2, 3, 4, 5]))
    assert_equal(whole, weights(config, [0, 3, 5]))


def test_residual_kind_does_not_matter():
    block, standard = (
        weights(tiny_config("block"), [0, 5]),
        weights(tiny_config("standard"), [0, 5]),
    )
    assert_equal(standard, {name: block[name] for name in standard})
    assert len(block) == len(standard) + 4 * 5 + 2


def test_dtype_does_not_matter():
    config = tiny_config()
    single, double = (weights(config, [0, 5], dtype=d) for d in (torch.float32, torch.float64))
    assert_equal({name: tensor.double() for name, tensor in single.items()}, double)


def test_meta_device_is_materialised():
    config = tiny_config()
    assert_equal(weights(config, [0, 5]), weights(config, [0, 5], device="meta"))


def test_router_buffers_are_reset():
    chunk = ModelChunk(tiny_config(), 0, 5, device="meta").to_empty(device="cpu")
    gate = chunk.layers["1"].block_sparse_moe.gate
    gate.tokens_per_expert.fill_(9)
    gate.e_score_correction_bias.fill_(9)
    init_weights(chunk, 5)
    assert gate.tokens_per_expert.count_nonzero() == 0
    assert gate.e_score_correction_bias.count_nonzero() == 0


def test_seed_and_name_matter():
    config = tiny_config()
    first, second = weights(config, [0, 5], seed=1), weights(config, [0, 5], seed=2)
    name = "model.layers.1.block_sparse_moe.experts.{}.w1.weight"
    assert not torch.equal(first[name.format(0)], second[name.format(0)])
    assert not torch.equal(first[name.format(0)], first[name.format(1)])


def test_distributions():
    config = tiny_config(hidden_size=64, initializer_range=0.02)
    found = weights(config, [0, 5])
    for name, tensor in found.items():
        if name.endswith("norm.weight"):
            assert (tensor == 1).all(), name
        elif name.endswith("_res_proj.weight"):
            assert (tensor == 0).all(), name
        elif name.endswith("conv1d.weight"):
            assert tensor.abs().max() <= 0.5
            assert abs(tensor.std() - 0.5 / 3**0.5) < 0.08
        elif name.endswith("A_log"):
            assert ((tensor >= 0) & (tensor <= torch.tensor(16.0).log())).all()
        elif name.endswith("dt_bias"):
            step = torch.nn.functional.softplus(tensor)
            assert ((step > 0.9e-3) & (step < 0.11)).all()
        else:
            assert abs(tensor.std() / 0.02 - 1) < 0.25, name
            assert abs(tensor.mean()) < 0.005, name


@pytest.mark.parametrize(
    ("place", "name", "owner"),
    [
        ("layers.0.self_attn", "new_proj.weight", "model.kda.layer.KimiDeltaAttention"),
        ("layers.0", "mlp_res_gain", "model.layer.DecoderLayer"),
        ("", "bias", "model.chunk.ModelChunk"),
        ("", "xnorm.weight", "model.chunk.ModelChunk"),
    ],
)
def test_an_unknown_parameter_is_an_error(place, name, owner):
    chunk = ModelChunk(tiny_config(), 0, 5)
    module, _, leaf = name.rpartition(".")
    target = chunk.get_submodule(place)
    if module:
        setattr(target, module, nn.Linear(4, 4, bias=False))
    else:
        target.register_parameter(leaf, nn.Parameter(torch.ones(4)))
    full = f"{place}.{name}" if place else name
    with pytest.raises(ValueError, match=f"'{full}' has no rule: let attnres_train.{owner}"):
        init_weights(chunk, 5)


def test_two_rules_for_a_parameter_are_an_error():
    class Norm(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.norm = norm

        def parameter_rules(self, std: float) -> dict[str, ParameterRule]:
            return {"norm.weight": ParameterRule(constant(2.0))}

    chunk = ModelChunk(tiny_config(), 0, 5)
    layer = chunk.layers["0"]
    layer.input_layernorm = Norm(layer.input_layernorm)
    with pytest.raises(ValueError, match=r"0\.input_layernorm\.norm\.weight' has two rules"):
        init_weights(chunk, 5)


def test_every_parameter_has_its_rule_in_order():
    chunk = ModelChunk(tiny_config(), 0, 5)
    rules = parameter_rules(chunk)
    assert list(rules) == [name for name, _ in chunk.named_parameters()]
    assert rules["layers.0.self_attn.q_proj.weight"].is_matrix
    assert not rules["layers.0.mlp_res_proj.weight"].is_matrix
    assert not rules["layers.0.self_attn.A_log"].weight_decay
