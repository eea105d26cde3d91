from __future__ import annotations

import math

import pytest
import torch

from attnres_train.optim.muon import Muon, newton_schulz

SHAPES = [(8, 24), (24, 8), (16, 16), (5, 6, 10), (3, 10, 6), (2, 8, 24), (4, 24, 8)]


def reference_orthogonal(g: torch.Tensor) -> torch.Tensor:
    """Five Newton-Schulz steps on one matrix, as Moonlight's paper writes them."""
    x = g / (g.square().sum().sqrt() + 1e-7)
    if g.shape[0] > g.shape[1]:
        x = x.T
    for _ in range(5):
        s = x @ x.T
        x = 3.4445 * x + (-4.7750 * s + 2.0315 * s @ s) @ x
    return x.T if g.shape[0] > g.shape[1] else x


def reference_muon(w, grads, lr, mu, decay):
    """Muon on one matrix, step by step."""
    buf = torch.zeros_like(w)
    for g in grads:
        buf = mu * buf + g
        o = reference_orthogonal(g + mu * buf)
        w = w - lr * (0.2 * math.sqrt(max(w.shape)) * o + decay * w)
    return w


def make_params(seed: int, dtype: torch.dtype, shapes=SHAPES) -> list[torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=gen, dtype=dtype) for shape in shapes]


def train(params: list[torch.Tensor], grads: list[list[torch.Tensor]], **options) -> Muon:
    muon = Muon(params, lr=0.02, **options)
    for step in grads:
        for param, grad in zip(params, step, strict=True):
            param.grad = grad.clone()
        muon.step()
    return muon


@pytest.mark.parametrize("max_batch_elements", [1, 400, 1000, 2**26])
def test_fp64_against_a_loop_over_single_matrices(max_batch_elements):
    before = make_params(0, torch.float64)
    grads = [make_params(seed, torch.float64) for seed in (1, 2, 3)]
    params = [w.clone() for w in before]
    train(params, grads, ns_dtype=torch.float64, max_batch_elements=max_batch_elements)
    for i, (w, result) in enumerate(zip(before, params, strict=True)):
        matrices = w.view(-1, *w.shape[-2:])
        for e, matrix in enumerate(matrices):
            of_matrix = [step[i].view(matrices.shape)[e] for step in grads]
            expected = reference_muon(matrix, of_matrix, 0.02, 0.95, 0.1)
            got = result.view(matrices.shape)[e]
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


def test_against_torch_muon_which_runs_in_bf16():
    shapes = [s for s in SHAPES if len(s) == 2]
    grads = [make_params(seed, torch.float32, shapes) for seed in (1, 2)]
    ours, theirs = (
        [torch.nn.Parameter(w) for w in make_params(0, torch.float32, shapes)] for _ in range(2)
    )
    train(ours, grads)
    torch_muon = torch.optim.Muon(theirs, lr=0.02, adjust_lr_fn="match_rms_adamw")
    for step in grads:
        for param, grad in zip(theirs, step, strict=True):
            param.grad = grad.clone()
        torch_muon.step()
    start = make_params(0, torch.float32, shapes)
    for a, b, w in zip(ours, theirs, start, strict=True):
        assert (a - b).norm() < 0.02 * (b - w).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_update_rms_is_about_a_fifth_of_the_learning_rate(dtype):
    shapes = [(64, 192), (192, 64), (128, 128), (4, 64, 96)]
    params = [torch.zeros(shape) for shape in shapes]
    train(params, [make_params(1, torch.float32, shapes)], ns_dtype=dtype)
    for param in params:
        for matrix in param.view(-1, *param.shape[-2:]):
            assert 0.15 < matrix.square().mean().sqrt() / 0.02 < 0.23


@pytest.mark.parametrize("shape", [(3, 32, 96), (3, 96, 32)])
def test_singular_values_come_near_one_whatever_the_scale(shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    g *= torch.tensor([1e-3, 1.0, 1e5], dtype=torch.float64).view(3, 1, 1)
    values = torch.linalg.svdvals(newton_schulz(g, 5, torch.float64))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_an_expert_without_tokens_is_only_decayed():
    experts = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    before = experts.clone()
    grad = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(1))
    grad[1] = 0
    train([experts], [[grad]], ns_dtype=torch.float32)
    torch.testing.assert_close(experts[1], before[1] * (1 - 0.02 * 0.1), rtol=1e-6, atol=0)
    assert not torch.allclose(experts[0], before[0], atol=1e-3)


def test_vectors_and_filters_are_refused():
    with pytest.raises(ValueError, match="matrices"):
        Muon([torch.zeros(4)], lr=0.1)
