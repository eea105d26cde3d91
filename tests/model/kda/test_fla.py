"""The hand-over to fla's kernels, with fakes: fake CUDA tensors, or our own operator as kernel."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from attnres_train.config.model_schema import KDAConfig
from attnres_train.model.kda.fla import (
    gated_kda_kernel,
    kda_kernel,
    run_gated_kda_kernel,
    run_kda_kernel,
)
from attnres_train.model.kda.gated import gated_kda
from attnres_train.model.kda.inputs import DecayGate, KDAInputs
from attnres_train.model.kda.operator import chunk_kda
from tests.model.kda.reference import log_decay, random_inputs

GATES = [{}, {"gate": "lower_bound"}, {"gate": "lower_bound", "gate_lower_bound": -7.0}]


def install(monkeypatch, kernel: Callable) -> None:
    """A module `fla.ops.kda` with ``kernel`` as its chunk_kda."""
    module = ModuleType("fla.ops.kda")
    module.chunk_kda = kernel
    for name, stand_in in (("fla", ModuleType("fla")), ("fla.ops", ModuleType("fla.ops"))):
        monkeypatch.setitem(sys.modules, name, stand_in)
    monkeypatch.setitem(sys.modules, "fla.ops.kda", module)


@pytest.fixture
def calls(monkeypatch) -> list[dict]:
    """The arguments of every call of a chunk_kda as it was before it had gates."""
    recorded: list[dict] = []

    def fake_kernel(q, k, v, g, beta, **options):
        recorded.append({"q": q, "k": k, "v": v, "g": g, "beta": beta, **options})
        return torch.empty_like(v), None

    install(monkeypatch, fake_kernel)
    return recorded


@pytest.fixture
def gated_calls(monkeypatch) -> list[dict]:
    """The arguments of every call of a chunk_kda with the parameters of fla-core 0.6's."""
    recorded: list[dict] = []

    def fake_kernel(
        q,
        k,
        v,
        g,
        beta,
        scale=None,
        initial_state=None,
        use_qk_l2norm_in_kernel=False,
        use_gate_in_kernel=False,
        use_beta_sigmoid_in_kernel=False,
        safe_gate=False,
        lower_bound=None,
        cu_seqlens=None,
        **kwargs,
    ):
        recorded.append(dict(locals()) | kwargs)
        return torch.empty_like(v), None

    install(monkeypatch, fake_kernel)
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
    inputs = KDAInputs(*random_inputs(batch, 20, 2, 4, 3, -0.2))
    borders = torch.tensor([0, 7, 12, 20 * batch])

    def kernel(q, *rest, **options):
        assert q.shape[0] == 1
        return chunk_kda(q, *rest, **options)

    got, _ = run_kda_kernel(kernel, inputs, initial_state=None, cu_seqlens=borders)
    wanted, _ = chunk_kda(*inputs, cu_seqlens=borders)
    assert torch.allclose(got, wanted, rtol=1e-12, atol=1e-14)


def gate_of(config: KDAConfig, device: str, dtype: torch.dtype) -> DecayGate:
    """For 2 heads of 8."""
    A_log = torch.full((1, 1, 2, 1), 0.3, dtype=dtype, device=device)
    dt_bias = torch.full((16,), -0.1, dtype=dtype, device=device)
    return DecayGate(A_log, dt_bias, config.lower_bound)


def fake_call(gate: dict) -> None:
    """KDA with gates of bf16 tensors, two rows of 64 fake CUDA tokens."""
    bf16 = {"dtype": torch.bfloat16, "device": "cuda"}
    with FakeTensorMode():
        decay_gate = gate_of(KDAConfig(**gate), "cuda", torch.float32)
        qkv_decay = [torch.empty(2, 64, 2, 8, **bf16) for _ in range(4)]
        raw = KDAInputs(*qkv_decay, torch.empty(2, 64, 2, **bf16))
        o = gated_kda(raw, decay_gate, cu_seqlens=None, chunk_size=64)
    assert o.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("gate", "lower_bound", "is_safe"),
    [(GATES[0], None, False), (GATES[1], -5.0, True), (GATES[2], -7.0, False)],
    ids=["softplus", "lower_bound", "low_bound"],
)
def test_gates_go_into_the_kernel(gated_calls, gate, lower_bound, is_safe):
    fake_call(gate)
    (call,) = gated_calls
    for name in ("qk_l2norm", "gate", "beta_sigmoid"):
        assert call[f"use_{name}_in_kernel"] is True
    assert call["lower_bound"] == lower_bound
    assert call["safe_gate"] is is_safe
    assert call["A_log"].shape == (2,)
    assert call["dt_bias"].shape == (16,)
    assert call["A_log"].dtype == call["dt_bias"].dtype == torch.float32
    assert {call[x].dtype for x in ("q", "k", "v", "g", "beta")} == {torch.bfloat16}
    assert call["g"].shape == (2, 64, 2, 8)
    assert call["beta"].shape == (2, 64, 2)
    assert call["chunk_size"] == 64
    assert call["scale"] is None  # fla's default is ours, K ** -0.5


@pytest.mark.parametrize("gate", GATES[:2], ids=str)
def test_a_kernel_without_gates_gets_them_computed(calls, gate):
    fake_call(gate)
    (call,) = calls
    assert not [name for name in call if name.endswith("_in_kernel")]
    assert call["g"].dtype == call["beta"].dtype == torch.float32
    with FakeTensorMode():
        assert gated_kda_kernel(torch.empty(1, 4, 1, 8, device="cuda"), 64) is None


@pytest.mark.parametrize("gate", GATES, ids=str)
@pytest.mark.parametrize("borders", [None, [0, 7, 12, 40]])
def test_a_kernel_with_gates_gives_the_same(gate, borders):
    """A stand-in that does with its arguments what fla documents, against our own gates."""

    def kernel(q, k, v, g, beta, *, A_log, dt_bias, lower_bound, cu_seqlens=None, **_):
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
        g = log_decay(g + dt_bias.view(2, 8), A_log.view(2, 1).exp(), lower_bound)
        return chunk_kda(q, k, v, g, beta.sigmoid(), cu_seqlens=cu_seqlens)

    rng = torch.Generator().manual_seed(2)
    qkv_decay = torch.randn(4, 2, 20, 2, 8, generator=rng, dtype=torch.float64)
    beta = torch.randn(2, 20, 2, generator=rng, dtype=torch.float64)
    inputs = (KDAInputs(*qkv_decay, beta), gate_of(KDAConfig(**gate), "cpu", torch.float64))
    borders = None if borders is None else torch.tensor(borders)
    options = {"cu_seqlens": borders, "chunk_size": 64}
    got, _ = run_gated_kda_kernel(kernel, *inputs, **options)
    wanted = gated_kda(*inputs, **options)
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-13)
