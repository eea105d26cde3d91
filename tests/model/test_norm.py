from __future__ import annotations

import pytest
import torch

from attnres_train.model.norm import RMSNorm


def random_norm(dtype: torch.dtype) -> tuple[RMSNorm, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    norm = RMSNorm(16, eps=1e-2).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(16, generator=rng))
    return norm, torch.randn(3, 5, 16, generator=rng, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_divides_by_the_root_mean_square(dtype):
    norm, x = random_norm(dtype)
    wanted = norm.weight * x / (x.square().mean(-1, keepdim=True) + 1e-2).sqrt()
    assert torch.allclose(norm(x), wanted, rtol=1e-14 if dtype == torch.float64 else 1e-6)


def test_bf16_statistics_are_fp32_and_the_weight_comes_after_the_cast():
    norm, x = random_norm(torch.bfloat16)
    wide = x.float()
    unit = (wide * (wide.square().mean(-1, keepdim=True) + 1e-2).rsqrt()).bfloat16()
    assert norm(x).dtype == torch.bfloat16
    assert torch.equal(norm(x), norm.weight * unit)


def test_gradcheck():
    norm, x = random_norm(torch.float64)
    assert torch.autograd.gradcheck(norm, (x[:1, :2].clone().requires_grad_(),))
