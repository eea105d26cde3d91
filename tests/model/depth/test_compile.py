"""`torch.compile` takes depth attention in one graph, with the same results."""

from __future__ import annotations

import pytest
import torch

from attnres_train.model.depth.attention import depth_attention
from tests.model.depth.reference import inputs
from tests.model.depth.test_two_phase import block_inputs, two_phase


def read(query, weight, *sources):
    return [depth_attention(query, weight, sources)]


def block(*leaves):
    return two_phase(3, *leaves)


@pytest.mark.parametrize("function", [read, block])
def test_compiles_in_one_graph(function):
    shape, dtype = (2, 5, 16), torch.float32
    if function is read:
        query, weight, sources = inputs(3, shape, dtype)
        leaves = [query, weight, *sources]
    else:
        leaves = block_inputs(4, 3, shape, dtype)
    torch.compiler.reset()
    outputs = torch.compile(function, backend="aot_eager", fullgraph=True)(*leaves)
    expected = function(*leaves)
    torch.testing.assert_close(outputs, expected)
    upstream = [torch.randn_like(x) for x in expected]
    grads = torch.autograd.grad(outputs, leaves, upstream)
    wanted = torch.autograd.grad(expected, leaves, upstream)
    torch.testing.assert_close(grads, wanted)
