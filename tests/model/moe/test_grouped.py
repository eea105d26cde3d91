"""Sorting tokens by expert and the grouped matmul, against plain indexing."""

from __future__ import annotations

import pytest
import torch

from attnres_train.model.moe.grouped import grouped_linear
from attnres_train.model.moe.permutation import Permutation, combine, dispatch

EXPERTS = torch.tensor([[3, 0], [0, 3], [3, 5], [5, 0]])  # experts 1, 2 and 4 get no token


def test_rows_are_sorted_by_expert_and_stable():
    permutation = Permutation.sort(EXPERTS, 6)
    assert permutation.token.tolist() == [0, 1, 3, 0, 1, 2, 2, 3]
    assert permutation.ends.tolist() == [3, 3, 3, 6, 6, 8]
    assert permutation.load.tolist() == [3, 0, 0, 3, 0, 2]
    assert permutation.inverse[permutation.order].tolist() == list(range(8))


def test_dispatch_and_combine():
    permutation = Permutation.sort(EXPERTS, 6)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    rows = dispatch(x, permutation)
    assert torch.equal(rows, x[[0, 1, 3, 0, 1, 2, 2, 3]])
    torch.testing.assert_close(combine(rows, permutation), 2 * x)
    scale = torch.randn(8, 1, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: combine(dispatch(x, permutation).sin() * scale, permutation), x
    )


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("ends", [[7, 7, 18, 20], [0, 20, 20, 20]])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float64, 1e-12)]
)
def test_grouped_linear(fused, ends, dtype, tolerance):
    if fused and dtype is torch.float64:
        pytest.skip("torch's grouped GEMM has no fp64")
    rows = torch.randn(20, 16, dtype=dtype, requires_grad=True)
    weight = torch.randn(4, 8, 16, dtype=dtype, requires_grad=True)
    probe = torch.randn(20, 8, dtype=dtype)
    y = grouped_linear(rows, weight, torch.tensor(ends, dtype=torch.int32), fused)
    ours = [y, *torch.autograd.grad(y, [rows, weight], probe)]

    expert = [sum(row >= end for end in ends) for row in range(20)]
    wide = [x.detach().double().requires_grad_() for x in (rows, weight)]
    expected = torch.einsum("ri,roi->ro", wide[0], wide[1][expert])
    theirs = [expected, *torch.autograd.grad(expected, wide, probe.double())]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), other, rtol=tolerance, atol=tolerance)


def test_gradient_that_is_not_contiguous():
    rows = torch.randn(6, 16, requires_grad=True)
    weight = torch.randn(2, 8, 16)
    ends = torch.tensor([2, 6], dtype=torch.int32)
    for fused in (False, True):
        (grad,) = torch.autograd.grad(grouped_linear(rows, weight, ends, fused).sum(), rows)
        expected = torch.stack([weight[0].sum(0)] * 2 + [weight[1].sum(0)] * 4)
        torch.testing.assert_close(grad, expected)
