"""Two-phase depth attention against one plain read per sublayer, in fp64."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from attnres_train.model.depth.attention import depth_attention, depth_phase1, depth_phase2
from tests.model.depth.reference import (
    TOLERANCE,
    assert_same_gradients,
    bytes_kept,
    inputs,
    random,
    reference,
)


def block_inputs(num_sources, size, shape, dtype=torch.float64):
    """``size`` queries and weights, ``size - 1`` partials, ``num_sources`` completed blocks."""
    dim = shape[-1]
    queries = [random(dim, dtype=dtype, scale=0.3, seed=100 + i) for i in range(size)]
    weights = [random(dim, dtype=dtype, seed=200 + i) for i in range(size)]
    partials = [random(*shape, dtype=dtype, seed=300 + i) for i in range(size - 1)]
    return [*queries, *weights, *partials, *inputs(num_sources, shape, dtype)[2]]


def split(size, leaves):
    pairs = list(zip(leaves[:size], leaves[size : 2 * size], strict=True))
    return pairs, leaves[2 * size : 3 * size - 1], leaves[3 * size - 1 :]


def two_phase(size, *leaves):
    """The inputs of a block's sublayers: the first reads the completed blocks alone (Eq. 6)."""
    pairs, partials, sources = split(size, leaves)
    first, *others = depth_phase1(pairs, sources)
    return [first.o, *map(depth_phase2, others, partials)]


def plain(size, *leaves):
    pairs, partials, sources = split(size, leaves)
    extra = [[], *([partial] for partial in partials)]
    return [reference(*pair, [*sources, *more]) for pair, more in zip(pairs, extra, strict=True)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("num_sources", "size"), [(2, 1), (3, 4), (8, 6)])
def test_equals_one_read_per_sublayer(num_sources, size, dtype):
    leaves = block_inputs(num_sources, size, (3, 7, 32), dtype)
    assert_same_gradients(lambda *x: two_phase(size, *x), lambda *x: plain(size, *x), leaves, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_one_completed_block(dtype):
    """The first query then has one source: its output is that source, bit for bit."""
    leaves = block_inputs(1, 3, (3, 7, 32), dtype)
    assert torch.equal(two_phase(3, *leaves)[0], leaves[-1])
    others = [x for i, x in enumerate(leaves) if i not in (0, 3)]

    def sublayers(form):
        return lambda *x: form(3, leaves[0], *x[:2], leaves[3], *x[2:])

    assert_same_gradients(sublayers(two_phase), sublayers(plain), others, dtype)


def test_several_tiles():
    leaves = block_inputs(3, 2, (1300, 257))
    assert_same_gradients(
        lambda *x: two_phase(2, *x), lambda *x: plain(2, *x), leaves, torch.float64
    )


def test_gradcheck_through_outputs_and_log_sum_exp():
    leaves = block_inputs(3, 2, (2, 2, 4))

    def function(*leaves):
        pairs, (partial,), sources = split(2, leaves)
        first, second = depth_phase1(pairs, sources)
        return first.o, first.lse, second.lse, depth_phase2(second, partial)

    assert gradcheck(function, leaves)


def test_log_sum_exp_logits_and_weights():
    pairs, (partial,), sources = split(2, block_inputs(4, 2, (3, 5, 16)))
    _, second = depth_phase1(pairs, sources)
    torch.testing.assert_close(second.lse, second.logits.logsumexp(-1))
    _, expected = depth_attention(*pairs[1], sources, return_weights=True)
    torch.testing.assert_close(second.weights, expected)
    _, merged = depth_phase2(second, partial, return_weights=True)
    _, expected = depth_attention(*pairs[1], [*sources, partial], return_weights=True)
    torch.testing.assert_close(merged, expected)


@pytest.mark.parametrize("order", [1, -1])
def test_log_sum_exp_beside_a_logit_of_another_size(order):
    """A logit of -20,000 says nothing, and must not cost the others their digits."""
    dim = 16
    query, weight = torch.eye(dim)[0] * 5000, torch.ones(dim)
    sources = [torch.zeros(1, dim) for _ in range(3)]
    sources[0][:, 0] = -1  # normalised to -4: its logit is -20,000
    sources[1][:, 1], sources[2][:, 2] = 1, 1  # logits of 0
    (read,) = depth_phase1([(query, weight)], sources[::order])
    assert read.logits.min() < -19_000
    torch.testing.assert_close(read.lse, torch.tensor([2.0]).log(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_huge_logits_stay_finite(sign, dtype):
    leaves = block_inputs(3, 2, (5, 64), dtype)
    leaves[1] = (leaves[1].detach() * sign * 1e4).requires_grad_()
    outputs = two_phase(2, *leaves)
    grads = torch.autograd.grad(sum(x.float().sum() for x in outputs), leaves)
    assert all(x.isfinite().all() for x in (*outputs, *grads))


def test_keeps_neither_a_copy_of_a_source_nor_a_phase_1_output():
    leaves = block_inputs(8, 6, (64, 256), torch.float32)
    kept, outputs = bytes_kept(lambda *x: two_phase(6, *x), leaves)
    scalars = 8 * 64 * (1 + 6) + 5 * 3 * 64  # read: inverse RMS, logits; merge: three per token
    folded = 3 * 6 * 256  # queries, weights and their product, for read and merges
    assert kept <= 4 * (scalars + folded) < 2 * outputs[0].nbytes


@pytest.mark.parametrize("num_sources", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_query_reads_the_same_bits_in_any_company(num_sources, dtype):
    """Else a model's forward pass would depend on where its chunks end."""
    pairs, _, sources = split(5, block_inputs(num_sources, 5, (3, 11, 48), dtype))
    together = depth_phase1(pairs, sources)
    apart = [
        read for few in (pairs[:1], pairs[1:3], pairs[3:]) for read in depth_phase1(few, sources)
    ]
    for found, expected in zip(apart, together, strict=True):
        assert torch.equal(found.o, expected.o)
        assert torch.equal(found.lse, expected.lse)


def test_one_gradient_tensor_per_source_for_all_queries():
    """All outputs come from one node of the graph, with one edge to each source."""
    pairs, _, sources = split(4, block_inputs(3, 4, (5, 16)))
    reads = depth_phase1(pairs, sources)
    (node,) = {x.grad_fn for read in reads for x in (read.o, read.lse)}
    assert len(node.next_functions) == 1 + len(sources)  # the queries, and each source


def test_no_query_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        depth_phase1([], [torch.zeros(2, 4)])


def test_mismatched_partial_is_an_error():
    pairs, _, sources = split(1, block_inputs(2, 1, (3, 4)))
    with pytest.raises(ValueError, match="source 1"):
        depth_phase2(depth_phase1(pairs, sources)[0], torch.zeros(2, 4))
