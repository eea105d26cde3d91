"""The hand-over to fla's kernels, with fakes: fake CUDA tensors, or our own operator as kernel."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from attnres_train.model.fla_backend import kda_kernel, run_kda_kernel
from attnres_train.model.kda import chunk_kda
from tests.model.kda_reference import random_inputs


@pytest.fixture
def calls(monkeypatch) -> list[dict]:
    """Installs a module `fla.ops.kda` whose chunk_kda records its arguments."""
    recorded: list[dict] = []

    def fake_kernel(q, k, v, g, beta, **options):
        recorded.append({"q": q, "k": k, "v": v, "g": g, "beta": beta, **options})
        return torch.empty_like(v), None

    module = ModuleType("fla.ops.kda")
    module.chunk_kda = fake_kernel
    for name, stand_in in (("fla", ModuleType("fla")), ("fla.ops", ModuleType("fla.ops"))):
        monkeypatch.setitem(sys.modules, name, stand_in)
    monkeypatch.setitem(sys.modules, "fla.ops.kda", module)
    return recorded


def fake_inputs(device: str, dtype: torch.dtype, batch: int = 2, size: int = 8):
    shape = (batch, 32, 2, size)
    q, k, g = (torch.empty(shape, device=device) for _ in range(3))
    v = torch.empty(shape, device=device, dtype=dtype)
    return q, k, v, g, torch.empty(shape[:3], device=device)


def test_gpu_tensors_go_to_fla(calls):
    with FakeTensorMode():
        o, state = chunk_kda(*fake_inputs("cuda", torch.bfloat16), chunk_size=32)
    (call,) = calls
    assert o.dtype == torch.bfloat16
    assert state is None
    assert {call[x].dtype for x in ("q", "k", "v")} == {torch.bfloat16}
    assert call["g"].dtype == torch.float32
    assert call["scale"] == 8**-0.5
    assert call["chunk_size"] == 32
    assert call["initial_state"] is None
    assert call["output_final_state"] is False


@pytest.mark.parametrize(
    ("device", "dtype", "size", "chunk_size"),
    [
        ("cpu", torch.float32, 8, 64),
        ("cuda", torch.float64, 8, 64),
        ("cuda", torch.float32, 512, 64),
        ("cuda", torch.float32, 8, 16),
    ],
)
def test_what_fla_does_not_cover_stays_with_us(calls, device, dtype, size, chunk_size):
    with FakeTensorMode():
        k = torch.empty(1, 4, 1, size, device=device, dtype=dtype)
        assert kda_kernel(k, chunk_size) is None
        supported = torch.empty(1, 4, 1, 8, device="cuda")
        assert kda_kernel(supported, 64) is not None


def test_without_fla_there_is_no_kernel(monkeypatch):
    monkeypatch.setitem(sys.modules, "fla.ops.kda", None)
    with FakeTensorMode():
        assert kda_kernel(torch.empty(1, 4, 1, 8, device="cuda"), 64) is None


@pytest.mark.parametrize("batch", [1, 2])
def test_packed_rows_reach_the_kernel_as_one(batch):
    """Our operator stands in for fla's, which takes packed documents in a batch of one only."""
    inputs = random_inputs(batch, 20, 2, 4, 3, -0.2)
    borders = torch.tensor([0, 7, 12, 20 * batch])

    def kernel(q, *rest, **options):
        assert q.shape[0] == 1
        return chunk_kda(q, *rest, **options)

    got, _ = run_kda_kernel(kernel, *inputs, initial_state=None, cu_seqlens=borders)
    wanted, _ = chunk_kda(*inputs, cu_seqlens=borders)
    assert torch.allclose(got, wanted, rtol=1e-12, atol=1e-14)
