"""Depth attention against the paper's formula written out in fp64."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, graph
from torch.utils.checkpoint import checkpoint

from attnres_train.model.depth.attention import depth_attention
from tests.model.depth.reference import TOLERANCE, assert_same_gradients, inputs, random, reference


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("count", range(2, 11))
def test_equals_the_paper_in_value_and_gradients(count, dtype):
    query, weight, sources = inputs(count, (3, 7, 32), dtype)
    assert_same_gradients(
        lambda q, w, *s: [depth_attention(q, w, s)],
        lambda q, w, *s: [reference(q, w, s)],
        [query, weight, *sources],
        dtype,
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_one_source_is_passed_through(dtype):
    query, weight, (source,) = inputs(1, (3, 7, 32), dtype)
    assert depth_attention(query, weight, [source]) is source


@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 3, 5)])
def test_gradcheck(shape):
    query, weight, sources = inputs(3, shape)
    assert gradcheck(lambda q, w, *s: depth_attention(q, w, s), (query, weight, *sources))


@pytest.mark.parametrize("shape", [(2500, 129), (1, 1), (3, 1, 2, 1031), (0, 8)])
def test_odd_shapes_over_several_tiles(shape):
    query, weight, sources = inputs(9, shape)
    actual = depth_attention(query, weight, sources)
    torch.testing.assert_close(actual, reference(query, weight, sources))
    actual.sum().backward()
    query_grad, query.grad = query.grad, None
    reference(query, weight, sources).sum().backward()
    torch.testing.assert_close(query_grad, query.grad)


def test_zero_query_gives_the_mean():
    _, weight, sources = inputs(4, (6, 16))
    query = torch.zeros(16, dtype=torch.float64, requires_grad=True)
    actual, weights = depth_attention(query, weight, sources, return_weights=True)
    torch.testing.assert_close(actual, torch.stack(sources).mean(0))
    assert weights.shape == (6, 4)
    torch.testing.assert_close(weights, torch.full_like(weights, 0.25))
    actual.square().sum().backward()
    assert query.grad.abs().max() > 0, "the query must be able to leave zero"
    assert not weight.grad.any(), "the key norm weight cannot act through a zero query"


def test_weights_are_those_of_the_output():
    query, weight, sources = inputs(4, (2, 3, 16))
    actual, weights = depth_attention(query, weight, sources, return_weights=True)
    assert weights.shape == (2, 3, 4) and not weights.requires_grad
    torch.testing.assert_close(torch.einsum("btn,nbtd->btd", weights, torch.stack(sources)), actual)
    _, alone = depth_attention(query, weight, sources[:1], return_weights=True)
    assert alone.shape == (2, 3, 1) and (alone == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_huge_logits_stay_finite(dtype):
    query, weight, sources = inputs(3, (5, 64), dtype)
    query = (query.detach() * 1e4).requires_grad_()
    actual = depth_attention(query, weight, sources)
    grads = torch.autograd.grad(actual.float().sum(), [query, weight, *sources])
    assert all(x.isfinite().all() for x in (actual, *grads))


def test_non_contiguous_sources_and_gradients():
    query, weight, sources = inputs(3, (4, 6, 16))
    strided = [source.transpose(0, 1) for source in sources]
    strided[0] = random(6, 4, 32)[..., ::2]
    assert_same_gradients(
        lambda q, w, *s: [depth_attention(q, w, s).transpose(0, 1)],
        lambda q, w, *s: [reference(q, w, s).transpose(0, 1)],
        [query, weight, *strided],
        torch.float64,
    )


def test_inputs_are_left_as_they_are_even_when_shared_with_a_detached_leaf():
    query, weight, sources = inputs(3, (5, 16))
    detached = [source.detach() for source in sources]
    before = [(x.clone(), x._version) for x in detached]
    shared = [x.requires_grad_() for x in (d.detach() for d in detached)]
    depth_attention(query, weight, [*shared, shared[0]]).sum().backward()
    for x, (old, version) in zip(detached, before, strict=True):
        assert torch.equal(x, old) and x._version == version
    assert shared[0].grad.shape == detached[0].shape and detached[0].grad is None


def test_saves_no_copy_of_a_source():
    query, weight, sources = inputs(8, (64, 256), torch.float32)
    known = {x.untyped_storage().data_ptr() for x in sources}
    extra = []

    def pack(x):
        if x.untyped_storage().data_ptr() not in known:
            extra.append(x.nbytes)
        return x

    with graph.saved_tensors_hooks(pack, lambda x: x):
        depth_attention(query, weight, sources)
    scalars = 2 * 8 * 64  # an inverse RMS and a logit per (source, token)
    vectors = 8 * 256  # the query, folded and not, its weight and their casts
    assert sum(extra) <= 4 * (scalars + vectors) < sources[0].nbytes


def test_checkpointed_and_without_gradient():
    query, weight, sources = inputs(3, (5, 16))
    leaves = (query, weight, *sources)
    plain = depth_attention(query, weight, sources)
    again = checkpoint(lambda q, w, *s: depth_attention(q, w, s), *leaves, use_reentrant=False)
    with torch.no_grad():
        assert torch.equal(depth_attention(query, weight, sources), plain)
    expected = torch.autograd.grad(plain.sum(), leaves)
    for actual, wanted in zip(torch.autograd.grad(again.sum(), leaves), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_autocast_does_not_lower_the_statistics():
    query, weight, sources = inputs(3, (5, 64), torch.float32)
    plain = depth_attention(query, weight, sources)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(depth_attention(query, weight, sources), plain)


def test_double_backward_is_refused():
    query, weight, sources = inputs(2, (5, 16))
    (grad,) = torch.autograd.grad(
        depth_attention(query, weight, sources).square().sum(), query, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_wrong_inputs_are_named():
    query, weight, sources = inputs(2, (5, 16))
    with pytest.raises(ValueError, match="at least one source"):
        depth_attention(query, weight, [])
    with pytest.raises(ValueError, match="source 1"):
        depth_attention(query, weight, [sources[0], sources[1].float()])
    with pytest.raises(ValueError, match=r"must be \[16\]"):
        depth_attention(query[:8], weight, sources)
