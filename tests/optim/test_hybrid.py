from __future__ import annotations

import pytest
import torch

from attnres_train.config.schema import OptimizerConfig
from attnres_train.model.parameters import ParameterRule, constant
from attnres_train.optim.build import build_optimizer
from attnres_train.optim.muon import Muon
from tests.optim.state import copy_state

SHAPES = {
    "embed_tokens.weight": (10, 6),
    "layers.0.self_attn.q_proj.weight": (8, 6),
    "layers.0.self_attn.A_log": (1, 1, 2, 1),
    "layers.0.self_attention_res_proj.weight": (1, 6),
    "layers.1.block_sparse_moe.experts.w1": (3, 4, 6),
    "norm.weight": (6,),
}
QUERY = "layers.0.self_attention_res_proj.weight"
MATRICES = {"layers.0.self_attn.q_proj.weight", "layers.1.block_sparse_moe.experts.w1"}
RULES = {
    name: ParameterRule(
        constant(0.0), is_matrix=name in MATRICES, weight_decay=not name.endswith("A_log")
    )
    for name in SHAPES
}


def make(dtype=torch.float64, **options):
    gen = torch.Generator().manual_seed(0)
    params = {
        name: torch.nn.Parameter(torch.randn(shape, generator=gen, dtype=torch.float64).to(dtype))
        for name, shape in SHAPES.items()
    }
    config = OptimizerConfig(ns_dtype="fp64" if dtype == torch.float64 else "fp32", **options)
    return params, build_optimizer(params.items(), RULES, config, "cpu")


def grads(seed: int, dtype=torch.float64) -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=gen, dtype=torch.float64).to(dtype)
        for name, shape in SHAPES.items()
    }


def run(params, optimizer, steps, dtype=torch.float64, skip=()):
    for step in steps:
        optimizer.zero_grad()
        for name, grad in grads(step, dtype).items():
            if name not in skip:
                params[name].grad = grad
        optimizer.step(lr=0.01 * step)


def test_each_parameter_moves_as_its_own_optimizer_moves_it():
    params, optimizer = make()
    expected, _ = make()
    muon = Muon([expected[n] for n in SHAPES if n in MATRICES], lr=1, ns_dtype=torch.float64)
    adamw = {
        decay: torch.optim.AdamW(
            [p for n, p in expected.items() if n not in MATRICES and n.endswith("A_log") != decay],
            betas=(0.9, 0.95),
            weight_decay=0.1 * decay,
        )
        for decay in (True, False)
    }
    for step in (1, 2, 3):
        for name, grad in grads(step).items():
            expected[name].grad = grad
        for single in (muon, *adamw.values()):
            for group in single.param_groups:
                group["lr"] = 0.01 * step
            single.step()
    run(params, optimizer, (1, 2, 3))
    for name in SHAPES:
        assert torch.equal(params[name], expected[name]), name
    assert optimizer.steps.item() == 3


def test_state_holds_one_tensor_of_the_parameters_shape_per_key():
    _, optimizer = make(torch.bfloat16)
    state = {(name, key): tensor for name, key, tensor in optimizer.state_tensors()}
    keys = {name: {k for n, k in state if n == name} for name in SHAPES}
    for name, shape in SHAPES.items():
        adamw = {"exp_avg", "exp_avg_sq", "master"}
        assert keys[name] == ({"momentum_buffer", "master"} if name in MATRICES else adamw)
        assert {tuple(t.shape) for (n, _), t in state.items() if n == name} == {shape}
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def test_kind_adamw_has_no_muon_state():
    _, optimizer = make(kind="adamw")
    assert {key for _, key, _ in optimizer.state_tensors()} == {"exp_avg", "exp_avg_sq"}


def test_a_missing_gradient_counts_as_zero():
    runs = []
    for missing in (True, False):
        params, optimizer = make()
        run(params, optimizer, (1,))
        optimizer.zero_grad()
        if not missing:
            params[QUERY].grad = torch.zeros(SHAPES[QUERY], dtype=torch.float64)
        optimizer.step(0.1)
        state = {f"{key}.{name}": t for name, key, t in optimizer.state_tensors()}
        runs.append({**params, **state})
    assert all(torch.equal(a, b) for a, b in zip(*(r.values() for r in runs), strict=True))


def test_masters_collect_updates_that_bf16_cannot_hold():
    params, optimizer = make(torch.bfloat16, weight_decay=0.0, kind="adamw")
    start = params["norm.weight"].detach().clone()
    for _ in range(50):
        optimizer.zero_grad()
        params["norm.weight"].grad = torch.ones(6, dtype=torch.bfloat16)
        optimizer.step(lr=1e-4)
    masters = {name: t for name, key, t in optimizer.state_tensors() if key == "master"}
    torch.testing.assert_close(masters["norm.weight"], start.float() - 50e-4, atol=1e-6, rtol=0)
    assert torch.equal(params["norm.weight"], masters["norm.weight"].bfloat16())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_continuing_from_copied_state_is_bitwise(dtype):
    params, optimizer = make(dtype)
    run(params, optimizer, (1, 2), dtype)
    resumed, second = make(dtype)
    copy_state((params, optimizer), (resumed, second))
    run(params, optimizer, (3, 4), dtype, skip={QUERY})
    run(resumed, second, (3, 4), dtype, skip={QUERY})
    for name in SHAPES:
        assert torch.equal(params[name], resumed[name]), name


def test_a_scaled_parameter_is_its_scaled_master_rounded():
    params, optimizer = make(torch.bfloat16)
    name = "layers.0.self_attn.q_proj.weight"
    run(params, optimizer, [1], torch.bfloat16)
    state = {(n, key): t.clone() for n, key, t in optimizer.state_tensors()}
    factors = torch.tensor([[1.0]] * 4 + [[0.7]] * 4, dtype=torch.float64)
    before = params[name].detach().clone()
    optimizer.scale(name, factors)
    for n, key, tensor in optimizer.state_tensors():
        expected = state[n, key]
        if (n, key) == (name, "master"):
            expected = expected * factors.float()
            assert torch.equal(params[name], expected.bfloat16())
        assert torch.equal(tensor, expected)
    assert torch.equal(params[name][:4], before[:4]) and not torch.equal(params[name], before)
