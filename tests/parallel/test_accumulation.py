"""Gradients added up by the product that makes them. apex needs a GPU: torch has its place here."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from attnres_train.config.schema import TrainSection
from attnres_train.model.ports import AllHere, Ports
from attnres_train.model.split import MakeLinear, Whole, plain_linear
from attnres_train.parallel.accumulation import (
    AccumulatingLinear,
    accumulating_maps,
    apex_accumulation,
)
from attnres_train.parallel.linear import differs, linear_maps
from attnres_train.parallel.ownership import Update
from attnres_train.parallel.pieces import Held, make_pieces
from attnres_train.parallel.reduction import GradientReduction
from tests.model.tiny import build, random_batch, tiny_config

BF16, CPU, CUDA = torch.bfloat16, torch.device("cpu"), torch.device("cuda")


def accumulate(rows: Tensor, grads: Tensor, total: Tensor) -> None:
    """What apex does."""
    assert rows.is_contiguous() and grads.is_contiguous() and total.dtype is torch.float32
    assert rows.dtype is grads.dtype is BF16 and rows.dim() == grads.dim() == 2
    total.addmm_(grads.T.float(), rows.float())


def rounded(rows: Tensor, grads: Tensor, total: Tensor) -> None:
    """As autograd does: each product in 16 bits, then added."""
    total += grads.T @ rows


def doubled(rows: Tensor, grads: Tensor, total: Tensor) -> None:
    total.addmm_(grads.T.float(), rows.float(), alpha=2)


def chunk_of(maps: MakeLinear, recompute: str):
    config = tiny_config()
    ports = Ports(AllHere(config.moe.num_experts), Whole(maps))
    return build(config, dtype=BF16, recompute=recompute, ports=ports)


def summed(maps: MakeLinear, recompute: str) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Gradients of three micro-batches, and how often the hooks of each parameter were called."""
    chunk, called = chunk_of(maps, recompute), {}
    for name, parameter in chunk.named_parameters():
        called[name] = 0

        def count(_: Tensor, name: str = name) -> None:
            called[name] += 1

        parameter.register_post_accumulate_grad_hook(count)
    for seed in range(3):
        chunk(random_batch(seed=seed), {}, None).loss.backward()
    return {name: p.grad for name, p in chunk.named_parameters() if p.grad is not None}, called


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_model_has_the_gradients_of_torchs_maps_to_the_bit_where_products_are_rounded(recompute):
    expected, called = summed(plain_linear, recompute)
    found, called_too = summed(accumulating_maps(rounded), recompute)
    assert called_too == called and set(called.values()) <= {0, 3}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient.dtype is torch.float32 and torch.equal(gradient, expected[name]), name
    modules = chunk_of(accumulating_maps(rounded), "none").modules()
    assert sum(isinstance(module, AccumulatingLinear) for module in modules) > 20


def test_sums_are_nearer_to_fp64_than_those_of_rounded_products():
    torch.manual_seed(0)
    weight, inputs = torch.randn(24, 16).to(BF16), torch.randn(8, 2, 10, 16).to(BF16)
    probes = torch.randn(8, 2, 10, 24).to(BF16)
    exact = torch.einsum("mbto,mbti->oi", probes.double(), inputs.double())
    off = {}
    for name, maps in (("torch", plain_linear), ("fused", accumulating_maps(accumulate))):
        linear = maps(16, 24)
        linear.weight.data, linear.weight.grad_dtype = weight.clone(), torch.float32
        for x, probe in zip(inputs, probes, strict=True):
            x = x.clone().requires_grad_()
            y = linear(x)
            y.backward(probe)
            torch.testing.assert_close(y, x @ weight.T, rtol=0.02, atol=0.02)
            torch.testing.assert_close(x.grad, probe @ weight, rtol=0.02, atol=0.02)
        off[name] = ((linear.weight.grad - exact).norm() / exact.norm()).item()
    assert off["fused"] < 1e-6 < 1e-4 < off["torch"]


def test_frozen_weights_and_inputs_that_want_no_gradient():
    linear = accumulating_maps(accumulate)(4, 3).to(BF16)
    linear.weight.grad_dtype = torch.float32
    x = torch.randn(2, 4).to(BF16)
    linear(x).sum().backward()
    assert linear.weight.grad is not None and x.grad is None
    linear.weight.grad = None
    linear.weight.requires_grad_(False)
    linear(x.requires_grad_()).sum().backward()
    assert linear.weight.grad is None and x.grad is not None


def three_maps() -> nn.Sequential:
    torch.manual_seed(0)
    maps = nn.Sequential(*(accumulating_maps(accumulate)(256, 256) for _ in range(3))).to(BF16)
    for parameter in maps.parameters():
        parameter.grad_dtype = torch.float32
    return maps


def inputs(rank: int) -> Tensor:
    return torch.randn(2, 6, 256, generator=torch.Generator().manual_seed(rank)).to(BF16)


def reduced() -> tuple[list[int], list[Tensor]]:
    """Runs on every rank: how many buckets had left when each map's gradient was whole, from the
    last map on, and the means of two micro-batches' sums."""
    maps, seen = three_maps(), []
    held = [Held(0, name, p, dist.group.WORLD) for name, p in maps.named_parameters()]
    costs = {one.name: Update(1, 1.0, 8) for one in held}
    reduction = GradientReduction(make_pieces(held, costs, sharded=False), 2)
    first, last = inputs(dist.get_rank())
    maps(first).sum().backward()
    for parameter in maps.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: seen.append(len(reduction._started)))
    with reduction.last_backward(0):
        maps(last).sum().backward()
    reduction.finish()
    return seen, [parameter.grad for parameter in maps.parameters()]


def test_gradients_leave_as_they_are_whole(pool):
    seen, means = pool.run(reduced, 2)[0]
    assert seen == [1, 2, 3]
    maps = three_maps()
    for rank in range(2):
        for batch in inputs(rank):
            maps(batch).sum().backward()
    for mean, parameter in zip(means, maps.parameters(), strict=True):
        torch.testing.assert_close(mean, parameter.grad / 2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("add", "told"), [(accumulate, ""), (doubled, "give another gradient of")])
def test_a_small_map_is_compared_with_torchs(add, told):
    found = differs(accumulating_maps(add), CPU, BF16, None)
    assert found.startswith(told) and bool(found) == bool(told)


def chosen(device=CUDA, dtype=BF16, autocast=None, backend="auto", find=lambda: accumulate):
    train = TrainSection(train_iters=1, seq_length=8, global_batch_size=1, backend=backend)
    return linear_maps(train, device, dtype, autocast, find)


def test_auto_takes_it_on_cuda_for_parameters_of_16_bits(monkeypatch, caplog):
    # Without CUDA, a small map on it fails: so it is known that it was to be taken.
    found = chosen()
    assert found is plain_linear or torch.cuda.is_available()
    assert "apex's fail" in caplog.text or torch.cuda.is_available()
    monkeypatch.setattr("attnres_train.parallel.linear.differs", lambda *_: "")
    assert isinstance(chosen()(6, 4), AccumulatingLinear)
    for others in (
        {"device": CPU},
        {"dtype": torch.float32},
        {"dtype": torch.float32, "autocast": BF16},
        {"backend": "torch"},
        {"find": apex_accumulation},  # is not installed
    ):
        assert chosen(**others) is plain_linear
