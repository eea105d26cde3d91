"""Router, experts and bias update against references in fp64 written from the formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from attnres_train.config.model_schema import MoEConfig
from attnres_train.model.moe.layer import MixtureOfExperts, router_loads, update_router_biases

HIDDEN, EXPERTS, TOP, WIDTH = 10, 6, 3, 7
CONFIG = MoEConfig(
    num_experts=EXPERTS,
    num_experts_per_token=TOP,
    intermediate_size=WIDTH,
    routed_scaling_factor=2.446,
)


def build(dtype=torch.float64, **changes) -> MixtureOfExperts:
    torch.manual_seed(0)
    moe = MixtureOfExperts(HIDDEN, CONFIG.model_copy(update=changes))
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    moe.gate.e_score_correction_bias.copy_(torch.randn(moe.gate.config.num_experts) * 0.3)
    return moe.to(dtype)


def swiglu(x, gate, up, down):
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def reference(moe: MixtureOfExperts, x: torch.Tensor) -> torch.Tensor:
    """Token by token: sort biased scores, weigh by the unbiased ones."""
    gate, experts, shared = moe.gate, moe.experts, moe.shared_experts
    rows = []
    for token in x:
        scores = 1 / (1 + torch.exp(-(gate.weight @ token)))
        biased = (scores + gate.e_score_correction_bias).tolist()
        chosen = sorted(range(EXPERTS), key=lambda e: -biased[e])[:TOP]
        total = sum(scores[e] for e in chosen)
        row = swiglu(token, shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight)
        for e in chosen:
            expert = swiglu(token, experts.w1[e], experts.w3[e], experts.w2[e])
            row = row + 2.446 * scores[e] / total * expert
        rows.append(row)
    return torch.stack(rows)


def test_output_and_gradients_equal_reference():
    moe = build()
    x = torch.randn(2, 8, HIDDEN, dtype=torch.float64, requires_grad=True)
    probe = torch.randn(2, 8, HIDDEN, dtype=torch.float64)
    inputs = [x, *moe.parameters()]
    y, _ = moe(x)
    expected = reference(moe, x.view(-1, HIDDEN)).view_as(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad((y * probe).sum(), inputs)
    theirs = torch.autograd.grad((expected * probe).sum(), inputs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


def test_selection_is_biased_and_weights_are_not():
    gate = build().gate
    x = torch.randn(50, HIDDEN, dtype=torch.float64)
    plain = torch.sigmoid(x @ gate.weight.T)
    gate.e_score_correction_bias.zero_()
    gate.e_score_correction_bias[2] = 10.0
    weights, experts = gate(x)
    assert (experts == 2).any(-1).all()
    torch.testing.assert_close(weights.sum(-1), torch.full((50,), 2.446, dtype=torch.float64))
    ratio = weights / plain.gather(-1, experts)
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))


def test_router_computes_in_fp32_under_autocast_and_bf16():
    moe = build(torch.float32)
    x = torch.randn(40, HIDDEN)
    expected, _ = moe.gate(x)
    with torch.autocast("cpu", torch.bfloat16):
        weights, _ = moe.gate(x)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, expected, rtol=0, atol=0)
    half = build(torch.bfloat16)
    assert half.gate(x.bfloat16())[0].dtype == torch.float32
    assert build(torch.float64).gate(x.double())[0].dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_follows_fp64(dtype):
    x = torch.randn(3, 5, HIDDEN).to(dtype)
    moe = build(dtype)
    exact = build(torch.float64)
    exact.load_state_dict({k: v.double() for k, v in moe.state_dict().items()})
    y, _ = moe(x)
    assert y.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(y.double(), exact(x.double())[0], rtol=tolerance, atol=tolerance)


def test_autocast_runs_experts_in_bf16_and_returns_fp32_gradients():
    moe = build(torch.float32)
    x = torch.randn(12, HIDDEN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = moe(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    exact, _ = moe(x)
    assert (y - exact).abs().max() < 0.05 * exact.abs().max()
    assert all(p.grad.dtype == torch.float32 for p in (x, *moe.parameters()))


def test_repeats_bit_for_bit():
    moe = build(torch.float32)
    x = torch.randn(64, HIDDEN, requires_grad=True)
    inputs = [x, *moe.parameters()]
    first, second = (torch.autograd.grad(moe(x)[0].square().sum(), inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_experts_without_tokens():
    moe = build()
    moe.gate.e_score_correction_bias.copy_(torch.tensor([9.0, 9, 9, 0, 0, 0]))
    x = torch.randn(5, HIDDEN, dtype=torch.float64)
    y, load = moe(x)
    assert load.tolist() == [5, 5, 5, 0, 0, 0]
    y.sum().backward()
    assert moe.experts.w1.grad[3:].count_nonzero() == 0
    assert moe.experts.w1.grad[:3].count_nonzero() > 0


def test_without_shared_expert():
    moe = build(num_shared_experts=0)
    assert not any("shared" in name for name, _ in moe.named_parameters())
    assert moe(torch.randn(4, HIDDEN, dtype=torch.float64))[0].shape == (4, HIDDEN)


def test_bias_update_pushes_toward_even_load():
    first, second = build(), build()
    before = first.gate.e_score_correction_bias.clone()
    first.gate.tokens_per_expert += torch.tensor([12, 3, 3, 3, 3, 0])  # mean 4
    second.gate.tokens_per_expert += 4
    update_router_biases([first, second], 0.01)
    sign = torch.tensor([-1.0, 1, 1, 1, 1, 1], dtype=torch.float64)
    moved = first.gate.e_score_correction_bias - before
    torch.testing.assert_close(moved, 0.01 * (sign - sign.mean()))
    assert torch.equal(second.gate.e_score_correction_bias, before)
    assert all(load.count_nonzero() == 0 for load in router_loads(first) + router_loads(second))


def test_loads_are_the_buffers_themselves():
    moe = build()
    router_loads(moe)[0].add_(3)
    assert moe.gate.tokens_per_expert.tolist() == [3] * EXPERTS
    assert "gate.tokens_per_expert" not in moe.state_dict()
    assert "gate.e_score_correction_bias" in moe.state_dict()
