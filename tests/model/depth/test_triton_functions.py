"""Depth attention by our Triton kernels, run on the CPU by Triton's interpreter.

The interpreter is chosen when the kernels are imported, by an environment variable: every check
here runs in one child process, which alone has it set.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from attnres_train.model.depth.attention import _operators
from attnres_train.model.depth.lean import DepthRead
from attnres_train.model.depth.two_phase import DepthMerge, DepthPhase1
from tests.model.depth.reference import (
    TOLERANCE,
    assert_close,
    assert_same_gradients,
    bytes_kept,
    inputs,
    random,
    reference,
)
from tests.model.depth.test_two_phase import block_inputs, plain, split

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
EPS = 1e-5
SLACK = 2  # the interpreter, unlike the kernels on a GPU, rounds to bf16 towards zero


def in_child() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def interpreted():
    """Runs a function of this module in the child process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=in_child) as child:
        try:
            child.submit(check_sum).result()
        except Exception as error:
            pytest.skip(f"Triton's interpreter does not run here: {error!r}")
        yield lambda function, *args: child.submit(function, *args).result()


def check_sum():
    """The interpreter at its simplest, with nothing of ours."""
    import triton
    import triton.language as tl

    @triton.jit
    def add(x, y, out, SIZE: tl.constexpr):
        i = tl.arange(0, SIZE)
        tl.store(out + i, tl.load(x + i) + tl.load(y + i))

    x, y, out = torch.randn(8), torch.randn(8), torch.empty(8)
    add[1,](x, y, out, 8)
    assert torch.equal(out, x + y)


def fold(query, weight):
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.to(wide) * weight.to(wide)


def kernel_read(query, weight, *sources):
    from attnres_train.model.depth.triton_functions import depth_read

    return depth_read(fold(query, weight), EPS, *sources)[0]


def kernel_two_phase(size, *leaves):
    from attnres_train.model.depth.triton_functions import Merge, Phase1

    pairs, partials, sources = split(size, leaves)
    queries = torch.stack([fold(*pair) for pair in pairs])
    _, *results = Phase1.apply(queries, EPS, *sources)
    reads, lses = results[:size], results[size:]
    merged = zip(queries[1:], reads[1:], lses[1:], partials, strict=True)
    return [reads[0], *(Merge.apply(*read, EPS)[0] for read in merged)]


def check_read(count, dtype, shape):
    query, weight, sources = inputs(count, shape, dtype)
    assert_same_gradients(
        lambda *x: [kernel_read(*x)],
        lambda q, w, *s: [reference(q, w, s)],
        [query, weight, *sources],
        dtype,
        SLACK,
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("count", [2, 9])
def test_read_equals_the_paper(interpreted, count, dtype):
    interpreted(check_read, count, dtype, (1, 7, 48))


@pytest.mark.parametrize("count", [1, 4, 5, 6, 7, 8, 10])
def test_any_number_of_sources(interpreted, count):
    interpreted(check_read, count, torch.float64, (3, 8))


@pytest.mark.parametrize("shape", [(2, 1), (1, 2, 1, 9), (2, 1500)])
def test_odd_shapes(interpreted, shape):
    interpreted(check_read, 3, torch.float64, shape)


def check_no_token():
    leaves = block_inputs(3, 2, (0, 8))
    outputs = kernel_two_phase(2, *leaves)
    assert [x.shape for x in outputs] == [(0, 8)] * 2
    grads = torch.autograd.grad(sum(x.sum() for x in outputs), leaves)
    assert not any(grad.any() for grad in grads)


def test_no_token(interpreted):
    interpreted(check_no_token)


def check_two_phase(num_sources, size, dtype, shape):
    leaves = block_inputs(num_sources, size, shape, dtype)
    assert_same_gradients(
        lambda *x: kernel_two_phase(size, *x), lambda *x: plain(size, *x), leaves, dtype, SLACK
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_two_phase_equals_one_read_per_sublayer(interpreted, dtype):
    interpreted(check_two_phase, 3, 2, dtype, (7, 48))


@pytest.mark.parametrize(("num_sources", "size"), [(9, 6), (2, 1), (5, 2), (4, 3), (1, 5)])
def test_any_number_of_queries(interpreted, num_sources, size):
    interpreted(check_two_phase, num_sources, size, torch.float64, (2, 12))


def check_results_of_phase_1():
    from attnres_train.model.depth.triton_functions import Merge, Phase1, depth_read

    pairs, (partial,), sources = split(2, block_inputs(3, 2, (2, 3, 16)))
    queries = torch.stack([fold(*pair) for pair in pairs])
    both = [function.apply(queries, EPS, *sources) for function in (Phase1, DepthPhase1)]
    for actual, expected in zip(*both, strict=True):
        torch.testing.assert_close(actual, expected)
    for actual, expected in zip(
        depth_read(queries[0], EPS, *sources),
        DepthRead.apply(queries[0], EPS, *sources),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected)
    read = (queries[1], both[0][2], both[0][4], partial, EPS)
    for actual, expected in zip(Merge.apply(*read), DepthMerge.apply(*read), strict=True):
        torch.testing.assert_close(actual, expected)
    upstream = [torch.randn_like(x) for x in both[0][1:]]  # also of the log-sum-exps
    grads = [torch.autograd.grad(x[1:], sources, upstream, retain_graph=True) for x in both]
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected)


def test_same_results_as_the_torch_functions(interpreted):
    """Logits and log-sum-exps too, in value, shape and gradient."""
    interpreted(check_results_of_phase_1)


def check_strides():
    query, weight, sources = inputs(3, (2, 3, 16))
    strided = [source.transpose(0, 1) for source in sources]
    strided[0] = random(3, 2, 32)[..., ::2]
    assert_same_gradients(
        lambda *x: [kernel_read(*x).transpose(0, 1)],
        lambda q, w, *s: [reference(q, w, s).transpose(0, 1)],
        [query, weight, *strided],
        torch.float64,
    )


def test_non_contiguous_sources_and_gradients(interpreted):
    interpreted(check_strides)


def check_huge_logits(sign, dtype):
    leaves = block_inputs(3, 2, (2, 16), dtype)
    leaves[1] = (leaves[1].detach() * sign * 1e4).requires_grad_()
    outputs = kernel_two_phase(2, *leaves)
    grads = torch.autograd.grad(sum(x.float().sum() for x in outputs), leaves)
    assert all(x.isfinite().all() for x in (*outputs, *grads))


@pytest.mark.parametrize("sign", [-1, 1])
def test_huge_logits_stay_finite(interpreted, sign):
    interpreted(check_huge_logits, sign, torch.float32)


def check_query_gradient():
    from attnres_train.model.depth.triton_functions import _query_gradient

    tokens = 270  # two splits, of the second only a part
    queries, sources = random(2, 8).detach(), [random(tokens, 8).detach()]
    along_query = random(tokens, 2, 1).detach()
    expected = torch.einsum("msn,nmd->sd", along_query, torch.stack(sources))
    actual = _query_gradient(queries, sources, along_query)
    assert_close(actual, expected, torch.float64)
    assert torch.equal(actual, _query_gradient(queries, sources, along_query))


def test_query_gradient_over_several_splits(interpreted):
    interpreted(check_query_gradient)


def check_saved():
    leaves = block_inputs(3, 2, (2, 64), torch.float32)
    kept, _ = bytes_kept(lambda *x: kernel_two_phase(2, *x), leaves)
    scalars = 2 * (3 + 2 * 3) + 3 * 2  # read: inverse RMS and logits; merge: three per token
    assert kept <= 4 * (scalars + 2 * 2 * 64)  # and queries, folded and stacked


def test_saves_references_and_scalars(interpreted):
    interpreted(check_saved)


def check_compile():
    leaves = block_inputs(2, 2, (2, 8))
    torch.compiler.reset()
    compiled = torch.compile(kernel_two_phase, backend="aot_eager", fullgraph=True)
    outputs, expected = compiled(2, *leaves), kernel_two_phase(2, *leaves)
    upstream = [torch.randn_like(x) for x in expected]
    assert all(map(torch.equal, outputs, expected))
    grads = torch.autograd.grad(outputs, leaves, upstream)
    assert all(map(torch.equal, grads, torch.autograd.grad(expected, leaves, upstream)))


def test_compiles_in_one_graph(interpreted):
    interpreted(check_compile)


def operators_for(device):
    with FakeTensorMode():
        return _operators(torch.empty(2, 8, device=device))


def test_cuda_tensors_go_to_the_kernels():
    from attnres_train.model.depth.triton_functions import Merge, Phase1, depth_read

    assert operators_for("cuda") == (depth_read, Phase1.apply, Merge.apply)
    assert operators_for("cpu") == (DepthRead.apply, DepthPhase1.apply, DepthMerge.apply)


def test_without_triton_cuda_tensors_stay_in_torch(monkeypatch):
    module = "attnres_train.model.depth.triton_functions"
    monkeypatch.setitem(sys.modules, module, None)  # as an import error in it leaves it
    assert operators_for("cuda") == operators_for("cpu")
