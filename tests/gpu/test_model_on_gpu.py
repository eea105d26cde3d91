"""The model on an accelerator against the same weights on the CPU."""

from __future__ import annotations

import pytest
import torch

from attnres_train.model.moe.grouped import grouped_linear
from attnres_train.parallel.accumulation import accumulating_maps, apex_accumulation
from attnres_train.parallel.linear import differs
from tests.model.tiny import assert_same_gradients, build, gradients, random_batch, tiny_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


def loss_and_gradients(device: str, **options):
    chunk = build(tiny_config(hidden_size=32), device=device, **options)
    loss = chunk(random_batch().to(device), {}, None).loss
    loss.backward()
    return loss.item(), {name: grad.double().cpu() for name, grad in gradients([chunk]).items()}


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_fp32_equals_the_cpu(recompute):
    loss, grads = loss_and_gradients("cuda", recompute=recompute)
    expected, exact = loss_and_gradients("cpu", dtype=torch.float64)
    assert loss == pytest.approx(expected, rel=1e-4)
    assert_same_gradients(exact, grads, rtol=1e-2)


@pytest.mark.parametrize(
    "options", [{"dtype": torch.bfloat16}, {"autocast_dtype": torch.bfloat16}], ids=str
)
def test_bf16_follows_the_cpu(options):
    loss, grads = loss_and_gradients("cuda", **options)
    expected, _ = loss_and_gradients("cpu", dtype=torch.float64)
    assert loss == pytest.approx(expected, rel=0.05)
    assert all(grad.isfinite().all() for grad in grads.values())


def test_idle_experts_get_no_gradient_from_the_grouped_gemm():
    ends = torch.tensor([5, 5, 64, 64], dtype=torch.int32, device="cuda")
    rows = torch.randn(64, 32, dtype=torch.bfloat16, device="cuda")
    weight = torch.randn(4, 16, 32, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    probe = torch.randn(64, 16, dtype=torch.bfloat16, device="cuda")
    grads = [
        torch.autograd.grad(grouped_linear(rows, weight, ends, fused), weight, probe)[0]
        for fused in (True, False)
    ]
    assert grads[0][[1, 3]].count_nonzero() == 0
    torch.testing.assert_close(*grads, rtol=0.05, atol=0.05)


def test_maps_with_apexs_accumulation_give_what_torchs_do():
    pytest.importorskip("fused_weight_gradient_mlp_cuda")
    maps = accumulating_maps(apex_accumulation())
    assert differs(maps, torch.device("cuda"), torch.bfloat16, None) == ""
