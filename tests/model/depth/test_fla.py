"""The hand-over of a read and its norm to fla's kernel, with fakes: fake CUDA tensors, or the
formula as kernel."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from attnres_train.model.blocks import Blocks
from attnres_train.model.depth.attention import depth_attention
from attnres_train.model.depth.fla import normed_read_kernel, run_normed_read
from attnres_train.model.norm import RMSNorm, rms_norm
from attnres_train.model.residual.attention_residuals import DepthQuery, DepthStream
from tests.model.depth.reference import inputs, random, reference

EPS = 1e-5


@pytest.fixture
def calls(monkeypatch) -> list[dict]:
    """The arguments of every call of a `fused_attnres` with the parameters of fla-core 0.6's."""
    recorded: list[dict] = []

    def fused_attnres(
        query,
        residuals,
        rms_weight,
        output_rms_weight=None,
        rms_eps=1e-6,
        scale=1.0,
        return_weights=False,
        checkpoint_level=1,
    ):
        recorded.append(dict(locals()))
        return torch.empty_like(residuals[0])

    for name in ("fla", "fla.ops", "fla.ops.attnres"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["fla.ops.attnres"].fused_attnres = fused_attnres
    return recorded


def sources_on(device, count=2, dtype=torch.bfloat16):
    return [torch.empty(4, 16, device=device, dtype=dtype) for _ in range(count)]


def test_gpu_reads_go_to_fla(calls):
    with FakeTensorMode():
        assert normed_read_kernel(sources_on("cuda"), EPS, EPS) is not None


def test_what_fla_does_not_cover_stays_with_us(calls):
    with FakeTensorMode():
        shifted = torch.empty(65, device="cuda", dtype=torch.bfloat16).narrow(0, 1, 64)
        assert normed_read_kernel(sources_on("cpu"), EPS, EPS) is None
        assert normed_read_kernel(sources_on("cuda", dtype=torch.float64), EPS, EPS) is None
        assert normed_read_kernel(sources_on("cuda", count=1), EPS, EPS) is None
        assert normed_read_kernel(sources_on("cuda"), EPS, 1e-6) is None
        assert normed_read_kernel([shifted.view(4, 16)] * 2, EPS, EPS) is None


def test_without_fla_there_is_no_kernel(monkeypatch):
    monkeypatch.setitem(sys.modules, "fla.ops.attnres", None)
    with FakeTensorMode():
        assert normed_read_kernel(sources_on("cuda"), EPS, EPS) is None


def test_the_kernel_gives_what_read_and_norm_give():
    """A stand-in that does with its arguments what fla documents."""

    def kernel(query, residuals, rms_weight, output_rms_weight, rms_eps):
        read = reference(query, rms_weight, residuals, rms_eps)
        return read / (read.square().mean(-1, keepdim=True) + rms_eps).sqrt() * output_rms_weight

    query, weight, sources = inputs(3, (2, 5, 16))
    norm_weight = random(16, seed=3)
    got = run_normed_read(kernel, query, weight, sources, norm_weight, 1e-3)
    wanted = rms_norm(depth_attention(query, weight, sources, 1e-3), norm_weight, 1e-3)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("recompute", [False, True])
def test_reads_of_their_own_are_handed_over(calls, recompute):
    """Blocks of two sublayers, read before sublayer 4: two blocks and the partial, which are a
    shared read in two phases and one of its own otherwise."""
    with FakeTensorMode(), torch.no_grad(), torch.device("cuda"):
        norm = RMSNorm(16, EPS)
        query = DepthQuery(torch.empty(16), torch.empty(16), EPS)
        *blocks, partial = sources_on("cuda", 3)
        shared, own = (
            DepthStream(Blocks(6, 2), {4: query}, blocks, partial, two_phase)
            for two_phase in (True, False)
        )
        shared.recompute = own.recompute = recompute
        assert shared.read_fused(4, norm) is None
        assert own.read_normed(4, norm).dtype == norm.weight.dtype
    (call,) = calls
    assert call["query"] is query.query and call["rms_weight"] is query.norm
    assert call["residuals"] == [*blocks, partial]
    assert call["output_rms_weight"] is norm.weight
    assert call["rms_eps"] == EPS
    assert (call["scale"], call["checkpoint_level"]) == (1.0, 1)
