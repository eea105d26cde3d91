from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnres_train.config.model_schema import KDAConfig
from attnres_train.model.chunk import ModelChunk
from attnres_train.model.init import init_weights
from attnres_train.model.kda.inputs import DecayGate
from attnres_train.model.kda.layer import (
    KimiDeltaAttention,
    init_decay_,
    kda_flops_per_token,
)
from attnres_train.model.kda.short_conv import short_conv
from tests.model.kda.reference import layer as reference_layer
from tests.model.tiny import tiny_config

HIDDEN, CONFIG = 12, KDAConfig(num_heads=3, head_dim=4, chunk_size=8)
BOUNDED = CONFIG.model_copy(update={"gate": "lower_bound", "gate_lower_bound": -3.0})


def make_layer(
    dtype: torch.dtype = torch.float64, config: KDAConfig = CONFIG
) -> KimiDeltaAttention:
    torch.manual_seed(0)
    layer = KimiDeltaAttention(HIDDEN, config, norm_eps=1e-5)
    for name, parameter in layer.named_parameters():
        torch.nn.init.normal_(parameter, std=0.5)
        wide = torch.promote_types(dtype, torch.float32)
        parameter.data = parameter.data.to(wide if name in ("A_log", "dt_bias") else dtype)
    return layer


def random_input(*shape: int) -> Tensor:
    rng = torch.Generator().manual_seed(1)
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


@pytest.mark.parametrize("config", [CONFIG, BOUNDED], ids=lambda config: config.gate)
def test_layer_equals_the_reference(config):
    layer, x = make_layer(config=config), random_input(2, 21, HIDDEN).requires_grad_()
    weights, bound = dict(layer.named_parameters()), config.lower_bound
    wanted = torch.stack([reference_layer(weights, row, 3, 1e-5, bound) for row in x])
    got = layer(x)
    assert torch.allclose(got, wanted, rtol=1e-10, atol=1e-12)
    dy = random_input(*got.shape)
    variables = [x, *weights.values()]
    wanted_grads = torch.autograd.grad(wanted, variables, dy)
    for name, a, b in zip(
        ["x", *weights], torch.autograd.grad(got, variables, dy), wanted_grads, strict=True
    ):
        assert (a - b).norm() <= 1e-10 * b.norm(), name


def test_names_and_shapes_are_the_released_ones():
    with torch.device("meta"):
        layer = KimiDeltaAttention(2304, KDAConfig(), 1e-5)
    wide, narrow = (4096, 2304), (128, 2304)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "q_proj.weight": wide,
        "k_proj.weight": wide,
        "v_proj.weight": wide,
        "q_conv1d.weight": (4096, 1, 4),
        "k_conv1d.weight": (4096, 1, 4),
        "v_conv1d.weight": (4096, 1, 4),
        "A_log": (1, 1, 32, 1),
        "dt_bias": (4096,),
        "f_a_proj.weight": narrow,
        "f_b_proj.weight": (4096, 128),
        "g_a_proj.weight": narrow,
        "g_b_proj.weight": (4096, 128),
        "b_proj.weight": (32, 2304),
        "o_norm.weight": (128,),
        "o_proj.weight": (2304, 4096),
    }
    assert sum(p.numel() for p in layer.parameters()) == 39_514_272


@pytest.mark.parametrize("rows", [1, 2])
def test_packed_documents_equal_separate_ones(rows):
    layer, x = make_layer(), random_input(rows, 24, HIDDEN)
    row_ends = range(24, 24 * rows, 24)
    borders = sorted({0, 1, 3, 10, 24 * rows - 5, 24 * rows, *row_ends})
    got = layer(x, torch.tensor(borders, dtype=torch.int32)).flatten(0, 1)
    flat = x.flatten(0, 1)
    for a, b in itertools.pairwise(borders):
        wanted = layer(flat[None, a:b])[0]
        assert torch.allclose(got[a:b], wanted, rtol=1e-10, atol=1e-13)


def test_bf16_keeps_the_decay_in_fp32():
    exact, layer = make_layer(torch.float32), make_layer(torch.bfloat16)
    assert layer.A_log.dtype == layer.dt_bias.dtype == torch.float32
    x = random_input(1, 40, HIDDEN).bfloat16()
    got, wanted = layer(x), exact(x.float())
    assert got.dtype == torch.bfloat16
    assert (got - wanted).norm() < 0.03 * wanted.norm()
    got.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("config", [CONFIG, BOUNDED], ids=lambda config: config.gate)
@pytest.mark.parametrize("a", [-60.0, 60.0, 1e4])
def test_extreme_decay_gates_stay_finite(a, config):
    layer, x = make_layer(torch.float32, config), random_input(1, 40, HIDDEN).float()
    with torch.no_grad():
        layer.dt_bias.fill_(a)
    layer(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_the_gate_has_its_bound():
    """Kimi-K3's gate by hand: -5 sigmoid(exp(A_log) (a + dt_bias)), two heads of two channels."""
    a = torch.tensor([[0.0, 2.0], [-1e3, 1e3]], dtype=torch.float64).view(1, 1, 2, 2)
    rates = torch.tensor([2.0, 1.0], dtype=torch.float64).log().view(1, 1, 2, 1)
    bias = torch.tensor([1.0, -2.0, 3.0, 4.0], dtype=torch.float64)
    got = DecayGate(rates, bias, -5.0).log_decay(a).flatten().tolist()
    assert got == pytest.approx([-5 / (1 + math.exp(-2)), -2.5, 0.0, -5.0], rel=1e-14)
    assert KDAConfig(gate="lower_bound").lower_bound == -5.0
    assert KDAConfig().lower_bound is None


def test_both_gates_have_the_same_parameters_and_flops():
    layers = [KimiDeltaAttention(HIDDEN, config, 1e-5) for config in (CONFIG, BOUNDED)]
    shapes = [{name: p.shape for name, p in layer.named_parameters()} for layer in layers]
    assert shapes[0] == shapes[1]
    assert kda_flops_per_token(HIDDEN, CONFIG) == kda_flops_per_token(HIDDEN, BOUNDED)


def test_initial_decay_of_the_bounded_gate():
    """A token without input decays by -3 (1 - exp(-dt)), dt as for the other gate."""
    chunk = ModelChunk(tiny_config(kda={**vars(BOUNDED), "head_dim": 64}), 0, 1)
    init_weights(chunk, seed=1)
    kda = chunk.layers["0"].self_attn
    assert kda.A_log.count_nonzero() == 0
    g = kda.decay_gate.log_decay(torch.zeros(1, 1, 3, 64))
    dt = -torch.log1p(g / 3)
    assert 0.99e-3 < dt.min() < 2e-3
    assert 0.05 < dt.max() < 0.1001


def test_initial_decay():
    rng = torch.Generator().manual_seed(5)
    a = init_decay_(torch.empty(1, 1, 4096, 1), "A_log", CONFIG, rng).exp()
    assert 1 <= a.min() < 1.05
    assert 15.95 < a.max() <= 16.001
    assert abs(a.mean() - 8.5) < 0.3
    dt = F.softplus(init_decay_(torch.empty(4096), "dt_bias", CONFIG, rng))
    assert 0.99e-3 < dt.min() < 1.05e-3
    assert 0.095 < dt.max() < 0.1001
    assert abs(dt.log().mean() - math.log(1e-2)) < 0.1
    again, same = (
        init_decay_(torch.empty(4096), "dt_bias", CONFIG, torch.Generator().manual_seed(5))
        for _ in range(2)
    )
    assert torch.equal(again, same)
    with pytest.raises(ValueError, match="q_proj"):
        init_decay_(torch.empty(3), "q_proj", CONFIG)


def test_chunk_size_is_checked_by_the_config():
    with pytest.raises(ValueError, match=r"chunk_size\n.*power of two"):
        KDAConfig(chunk_size=48)


def test_flops_of_the_48b_layer():
    projections = 2 * (4 * 2304 * 4096 + 2 * (2304 * 128 + 128 * 4096) + 2304 * 32)
    convolutions = 2 * 3 * 4096 * 4
    recurrence = 32 * 126_976
    wanted = projections + convolutions + recurrence
    assert kda_flops_per_token(2304, KDAConfig()) == wanted == 83_083_264


class TestShortConv:
    x = random_input(2, 11, 5)
    weight = random_input(5, 1, 4)

    def test_equals_a_padded_convolution(self):
        padded = F.pad(self.x.mT, (3, 0))
        wanted = F.silu(F.conv1d(padded, self.weight, groups=5).mT)
        assert torch.allclose(short_conv(self.x, self.weight), wanted, rtol=1e-12, atol=1e-14)

    @pytest.mark.parametrize("borders", [None, [0, 22], [0, 1, 3, 3, 9, 11, 22, 22]])
    @pytest.mark.parametrize("length", [11, 2])
    def test_gradcheck(self, borders, length):
        if borders is not None:
            borders = torch.tensor(borders).clamp(max=2 * length)
        x = self.x[:, :length].clone().requires_grad_()
        weight = self.weight.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda x, w: short_conv(x, w, borders), (x, weight))

    def test_documents_do_not_see_each_other(self):
        borders = [0, 1, 3, 9, 11]
        x = self.x[:1]
        got = short_conv(x, self.weight, torch.tensor(borders))
        for a, b in itertools.pairwise(borders):
            wanted = short_conv(x[:, a:b], self.weight)
            assert torch.allclose(got[:, a:b], wanted, rtol=1e-12, atol=1e-14)

    def test_bf16_sums_in_fp32(self):
        x, weight = self.x.bfloat16(), self.weight.bfloat16()
        wanted = short_conv(x.float(), weight.float()).bfloat16()
        assert torch.equal(short_conv(x, weight), wanted)

    def test_saves_its_input_alone(self):
        saved = []
        x, weight = self.x.clone().requires_grad_(), self.weight.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.append(t.numel()) or t, lambda t: t
        ):
            short_conv(x, weight)
        assert sorted(saved) == sorted([x.numel(), weight.numel()])
