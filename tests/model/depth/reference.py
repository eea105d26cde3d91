"""The paper's depth attention in fp64, and the comparison of operators with it."""

from __future__ import annotations

import torch
from torch.autograd import graph

# Of values and gradients, relative to the largest element: statistics are in fp32 at least, so what
# remains is the rounding of inputs and outputs to the sources' dtype.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def reference(query, weight, sources, eps=1e-5):
    """Eqs. 2-4 of arXiv 2603.15031: values v_n as they are, keys normalised."""
    values = torch.stack(list(sources)).double()
    keys = values / (values.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    attention = torch.einsum("d,n...d->n...", query.double(), keys).softmax(0)
    return torch.einsum("n...,n...d->...d", attention, values)


def random(*shape, dtype=torch.float64, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    x = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
    return x.to(dtype).requires_grad_()


def inputs(count, shape, dtype=torch.float64):
    """Query, key norm weight, and ``count`` sources of different sizes."""
    dim = shape[-1]
    sources = [random(*shape, dtype=dtype, scale=1 + i, seed=10 * i) for i in range(count)]
    return random(dim, seed=1, dtype=dtype, scale=0.3), random(dim, seed=2, dtype=dtype), sources


def assert_close(actual, expected, dtype, slack=1):
    scale = expected.abs().max().clamp_min(1e-6)
    error = (actual.double() - expected.double()).abs().max() / scale
    assert error <= slack * TOLERANCE[dtype], f"relative error {error:.2e} in {dtype}"


def assert_same_gradients(function, expected_function, leaves, dtype, slack=1):
    """Both functions take the leaves and return a list of outputs: compares these and all gradients
    of the same random projection."""
    outputs, expected = function(*leaves), expected_function(*leaves)
    for actual, wanted in zip(outputs, expected, strict=True):
        assert actual.dtype == dtype
        assert_close(actual, wanted, dtype, slack)
    upstream = [
        random(*x.shape, dtype=dtype, seed=77 + i).to(x.device) for i, x in enumerate(expected)
    ]
    grads = torch.autograd.grad(outputs, leaves, upstream)
    wanted_grads = torch.autograd.grad(expected, leaves, [g.double() for g in upstream])
    for actual, wanted in zip(grads, wanted_grads, strict=True):
        assert_close(actual, wanted, dtype, slack)


def bytes_kept(two_phase, leaves):
    """Bytes that a block's reads keep for their backward pass, and their outputs. Leaves do not
    count, nor do the merged outputs, which the sublayers keep as their inputs."""
    known, kept = {x.untyped_storage().data_ptr() for x in leaves}, {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in known:
            kept[x.untyped_storage().data_ptr()] = x.nbytes
        return x

    with graph.saved_tensors_hooks(pack, lambda x: x):
        outputs = two_phase(*leaves)
    for x in outputs[1:]:
        kept.pop(x.untyped_storage().data_ptr())
    return sum(kept.values()), outputs
