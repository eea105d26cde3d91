"""Chunked cross-entropy against torch's on whole logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from attnres_train.model.head import linear_cross_entropy


def problem(dtype=torch.float64, tokens=23):
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 8, generator=rng).to(dtype).requires_grad_()
    weight = torch.randn(31, 8, generator=rng).to(dtype).requires_grad_()
    labels = torch.randint(31, (tokens,), generator=rng)
    mask = torch.rand(tokens, generator=rng).round()
    return hidden, weight, labels, mask


@pytest.mark.parametrize("at_once", [1, 31 * 5, 31 * 23, 10**6])
def test_loss_and_gradients_equal_whole_logits(at_once):
    hidden, weight, labels, mask = problem()
    loss = linear_cross_entropy(hidden, weight, labels, mask, at_once)
    each = F.cross_entropy(hidden @ weight.T, labels, reduction="none")
    expected = (each * mask).sum() / mask.sum()
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    ours = torch.autograd.grad(loss * 3, [hidden, weight])
    theirs = torch.autograd.grad(expected * 3, [hidden, weight])
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-14)


def test_a_common_divisor_makes_parts_of_a_mean_over_all_tokens():
    """Two parts with 3 and 9 tokens in the loss: the mean of their losses is that of all."""
    hidden, weight, labels, _ = problem(tokens=24)
    mask = torch.cat((torch.ones(3), torch.zeros(9), torch.ones(9), torch.zeros(3)))
    whole = linear_cross_entropy(hidden, weight, labels, mask)
    parts = [
        linear_cross_entropy(hidden[part], weight, labels[part], mask[part], divisor=mask.sum() / 2)
        for part in (slice(0, 12), slice(12, 24))
    ]
    torch.testing.assert_close(sum(parts) / 2, whole, rtol=1e-13, atol=0)


def test_several_losses_are_parts_of_one():
    """Of three groups of tokens, one of them empty; all divide by the same."""
    hidden, weight, labels, mask = problem()
    groups = F.one_hot(torch.arange(23) % 2, 3).double()
    with torch.no_grad():
        found = linear_cross_entropy(
            hidden, weight, labels, mask[:, None] * groups, 31 * 5, divisor=mask.sum()
        )
        each = F.cross_entropy(hidden @ weight.T, labels, reduction="none") * mask / mask.sum()
        whole = linear_cross_entropy(hidden, weight, labels, mask, 31 * 5)
    expected = torch.stack([each[::2].sum(), each[1::2].sum(), torch.zeros(()).double()])
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(found.sum(), whole, rtol=1e-13, atol=0)
    with pytest.raises(ValueError, match="no gradients"):
        linear_cross_entropy(hidden, weight, labels, mask[:, None] * groups, divisor=mask.sum())


def test_gradcheck():
    hidden, weight, labels, mask = problem(tokens=4)
    mask[0] = 0.5
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, labels, mask, 62), (hidden, weight)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_is_fp32(dtype):
    hidden, weight, labels, mask = problem(dtype)
    loss = linear_cross_entropy(hidden, weight, labels, mask)
    exact = linear_cross_entropy(hidden.double(), weight.double(), labels, mask)
    assert loss.dtype == torch.float32
    assert abs(loss - exact) < {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    loss.backward()
    assert hidden.grad.dtype == weight.grad.dtype == dtype


def test_autocast_multiplies_in_bf16():
    hidden, weight, labels, mask = problem(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels, mask)
    rounded = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), labels, mask)
    assert torch.equal(loss, rounded)
    loss.backward()
    assert weight.grad.dtype == torch.float32


def test_empty_mask_gives_zero():
    hidden, weight, labels, mask = problem()
    loss = linear_cross_entropy(hidden, weight, labels, torch.zeros_like(mask))
    loss.backward()
    assert loss == 0
    assert hidden.grad.count_nonzero() == weight.grad.count_nonzero() == 0


def test_large_logits_stay_finite():
    hidden, weight, labels, mask = problem()
    loss = linear_cross_entropy(hidden * 1e4, weight, labels, mask)
    assert loss.isfinite()


def test_no_gradient_is_computed_without_grad_mode():
    hidden, weight, labels, mask = problem()
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, labels, mask)
    assert not loss.requires_grad
