from __future__ import annotations

import math

import pytest
import torch

from attnres_train.optim.clipping import clip_factor, grad_square_sum, scale_grads


def with_grads(*grads: torch.Tensor | None) -> list[torch.nn.Parameter]:
    params = []
    for grad in grads:
        dtype = torch.float32 if grad is None else grad.dtype
        params.append(
            torch.nn.Parameter(torch.zeros(() if grad is None else grad.shape, dtype=dtype))
        )
        params[-1].grad = grad
    return params


def test_square_sum_by_hand():
    params = with_grads(torch.tensor([3.0, 4.0]), None, torch.full((2, 3), 2.0), torch.tensor(1.0))
    total = grad_square_sum(params)
    assert total.dtype == torch.float64
    assert total.item() == pytest.approx(25 + 24 + 1)
    assert grad_square_sum([]).item() == 0


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, 1e-13), (torch.float32, 1e-8), (torch.bfloat16, 1e-5)]
)
def test_square_sum_is_accurate_over_millions_of_elements(dtype, rtol):
    grad = torch.randn(3_000_001, generator=torch.Generator().manual_seed(0)).to(dtype)
    total = grad_square_sum(with_grads(grad)).item()
    assert total == pytest.approx(grad.double().square().sum().item(), rel=rtol)


def test_square_sum_of_a_transposed_gradient():
    param = with_grads(torch.arange(6.0).view(2, 3))[0]
    param.data, param.grad = param.data.T, param.grad.T
    assert grad_square_sum([param]).item() == pytest.approx(55)


def test_clipping_brings_the_norm_to_the_limit():
    params = with_grads(torch.tensor([3.0, 4.0]), None, torch.tensor([12.0]))
    norm = math.sqrt(grad_square_sum(params))
    scale_grads(params, clip_factor(norm, 2.0))
    assert math.sqrt(grad_square_sum(params)) == pytest.approx(2.0)
    assert params[1].grad is None


@pytest.mark.parametrize(("norm", "limit"), [(0.5, 1.0), (1.0, 1.0), (50.0, 0.0), (0.0, 1.0)])
def test_no_clipping_within_the_limit_or_without_one(norm, limit):
    assert clip_factor(norm, limit) == 1.0
