"""The Triton kernels of depth attention at realistic sizes, against the formula in fp64."""

from __future__ import annotations

import pytest
import torch

from attnres_train.model.depth.attention import _operators, depth_attention
from attnres_train.model.norm import RMSNorm
from attnres_train.model.residual.attention_residuals import DepthQuery
from tests.model.depth.reference import assert_same_gradients, bytes_kept, inputs, reference
from tests.model.depth.test_two_phase import block_inputs, plain, two_phase

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def on_gpu(leaves):
    return [leaf.detach().cuda().requires_grad_() for leaf in leaves]


def upstream_like(outputs):
    torch.manual_seed(0)
    return [torch.randn_like(x) for x in outputs]


def test_cuda_tensors_go_to_the_kernels():
    pytest.importorskip("triton")
    assert _operators(torch.empty(1, device="cuda")).read.__name__ == "depth_read"


# Sizes of the 48B model, of the 194M one, and one that no power of two divides.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_sources", "size", "dim"), [(8, 6, 2304), (9, 6, 896), (10, 12, 7168), (3, 4, 333)]
)
def test_two_phase_equals_the_paper(num_sources, size, dim, dtype):
    leaves = on_gpu(block_inputs(num_sources, size, (2, 300, dim), dtype))
    assert_same_gradients(
        lambda *x: two_phase(size, *x), lambda *x: plain(size, *x), leaves, dtype, slack=2
    )


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("count", [2, 9, 17, 55])
def test_read_equals_the_paper(count, dtype):
    query, weight, sources = inputs(count, (300, 1024), dtype)
    assert_same_gradients(
        lambda q, w, *s: [depth_attention(q, w, s)],
        lambda q, w, *s: [reference(q, w, s)],
        on_gpu([query, weight, *sources]),
        dtype,
        slack=2,
    )


def test_unaligned_sources():
    query, weight, sources = inputs(3, (300, 256), torch.bfloat16)
    leaves = on_gpu([query, weight, *sources])
    shifted = torch.empty(300 * 256 + 1, dtype=torch.bfloat16, device="cuda")[1:].view(300, 256)
    leaves[2] = shifted.copy_(leaves[2].detach()).requires_grad_()
    assert_same_gradients(
        lambda q, w, *s: [depth_attention(q, w, s)],
        lambda q, w, *s: [reference(q, w, s)],
        leaves,
        torch.bfloat16,
        slack=2,
    )


def test_runs_are_equal_bit_for_bit():
    leaves = on_gpu(block_inputs(8, 6, (4096, 1024), torch.bfloat16))
    runs = []
    for _ in range(2):
        outputs = two_phase(6, *leaves)
        runs.append([*outputs, *torch.autograd.grad(outputs, leaves, upstream_like(outputs))])
    assert all(map(torch.equal, *runs))


def test_saves_references_and_scalars():
    leaves = on_gpu(block_inputs(8, 6, (4096, 1024), torch.bfloat16))
    kept, outputs = bytes_kept(lambda *x: two_phase(6, *x), leaves)
    scalars = 8 * 4096 * (1 + 6) + 5 * 3 * 4096
    folded = 3 * (6 + 5) * 1024  # queries, weights and their product, of read and merges
    assert kept <= 4 * (scalars + folded) < outputs[0].nbytes


def test_compiles_in_one_graph():
    leaves = on_gpu(block_inputs(3, 2, (64, 256), torch.bfloat16))
    compiled = torch.compile(lambda *x: two_phase(2, *x), fullgraph=True)
    outputs, expected = compiled(*leaves), two_phase(2, *leaves)
    torch.testing.assert_close(outputs, expected)
    upstream = upstream_like(expected)
    grads = torch.autograd.grad(outputs, leaves, upstream)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, leaves, upstream))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_read_and_norm_by_fla(dtype):
    pytest.importorskip("fla.ops.attnres")
    query, weight, sources = inputs(5, (300, 1024), dtype)
    query, weight, *sources = on_gpu([query, weight, *sources])
    norm = RMSNorm(1024, 1e-5).cuda()
    norm.weight.data = torch.randn_like(norm.weight)

    def fused(query, weight, norm_weight, *sources):
        return [DepthQuery(query, weight, 1e-5).attend_normed(sources, norm)]

    def wanted(query, weight, norm_weight, *sources):
        read = reference(query, weight, sources)
        scale = (read.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        return [read * scale * norm_weight.double()]

    leaves = [query, weight, norm.weight, *sources]
    assert_same_gradients(fused, wanted, leaves, dtype, slack=2)
