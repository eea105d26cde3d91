"""The hand-over to DeepEP, with a stand-in for its two kernels, which does what they do by our
exact exchange. The kernels themselves need GPUs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from attnres_train.config import load_config
from attnres_train.config.checks import check_config
from attnres_train.errors import UserError
from attnres_train.parallel import deepep
from attnres_train.parallel.dispatchers import token_exchange
from attnres_train.parallel.experts import ExpertExchange
from tests.parallel.test_experts import EXPERTS, HIDDEN, inputs, layer


def stand_in(there: bool = True) -> Any:
    """`megatron.core.transformer.moe.fused_a2a`."""

    def fused_dispatch(x: Tensor, indices: Tensor, probs: Tensor, num_experts: int, group: Any):
        assert x.dtype is torch.bfloat16 and probs.dtype is torch.float32
        assert indices.dtype is torch.int64
        sent = ExpertExchange(num_experts, group).send(x, indices, probs, x.dtype)
        here = sent.arrived()
        # A row per token, and its choices side by side: -1 where another rank has the expert.
        told = torch.full((len(here.tokens), indices.shape[1]), -1)
        weights = probs.new_zeros(told.shape)
        ends = here.pairs.ends.tolist()
        filled = [0] * len(told)
        for row, pair in enumerate(here.pairs.order.tolist()):
            token = int(here.pairs.token[row])
            place = token, filled[token]
            filled[token] += 1
            told[place] = next(e for e, end in enumerate(ends) if row < end)
            weights = weights.index_put([torch.tensor([i]) for i in place], here.weights[[pair]])
        return here.tokens, told, weights, None, sent

    def fused_combine(x: Tensor, group: Any, handle: Any):
        assert x.dtype is torch.bfloat16
        return handle.back(x), None

    return SimpleNamespace(
        HAVE_DEEP_EP=there, fused_dispatch=fused_dispatch, fused_combine=fused_combine
    )


def through_the_layer(kind: str) -> dict[str, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepep, "megatron_core", lambda name: stand_in())
        exchange = {"deepep": deepep.DeepEPExchange, "exact": ExpertExchange}[kind](
            EXPERTS, dist.group.WORLD
        )
        moe = layer([0.0] * EXPERTS, exchange).bfloat16()
        x = inputs([7, 4])[dist.get_rank()].bfloat16().requires_grad_()
        y, load = moe(x)
        (y.float() * torch.arange(1.0, HIDDEN + 1)).sin().sum().backward()
    gradients = {name: p.grad for name, p in moe.named_parameters()}
    return {"y": y.detach(), "load": load, "x": x.grad, **gradients}


def test_equals_the_exact_exchange(pool):
    expected, found = (
        pool.run(through_the_layer, 2, "exact"),
        pool.run(through_the_layer, 2, "deepep"),
    )
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(mine[name], value, rtol=0.02, atol=0.02, msg=name)


def refused(there: bool, dtype: torch.dtype) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepep, "megatron_core", lambda name: stand_in(there))
        with pytest.raises(UserError) as caught:
            exchange = deepep.DeepEPExchange(EXPERTS, dist.group.WORLD)
            exchange.send(inputs([7, 4])[0], torch.zeros(7, 3).long(), torch.zeros(7, 3), dtype)
    return str(caught.value)


def test_without_the_package_or_bf16_it_says_what_to_do(pool):
    (told, _) = pool.run(refused, 2, False, torch.bfloat16)
    assert "deep_ep is not installed" in told and "take exact" in told
    (told, _) = pool.run(refused, 2, True, torch.float32)
    assert "set train.precision to bf16" in told


def test_megatron_core_has_what_is_asked_for():
    kernels = deepep.megatron_core("transformer.moe.fused_a2a")
    assert {"HAVE_DEEP_EP", "fused_dispatch", "fused_combine"} <= set(dir(kernels))


def chosen() -> list[str]:
    names = []
    for kind in ("exact", "bounded"):
        config = load_config("quickstart", [f"parallel.expert_dispatcher={kind}"])
        names.append(type(token_exchange(config, dist.group.WORLD)).__name__)
    return names


def test_the_key_chooses(pool):
    assert pool.run(chosen, 2) == [["ExpertExchange", "BoundedExchange"]] * 2


def test_fp32_is_refused_before_any_worker_starts():
    config = load_config(
        "quickstart", ["parallel.expert_dispatcher=deepep", "train.precision=fp32"]
    )
    with pytest.raises(UserError, match=r"deepep, which sends bf16, but train\.precision is fp32"):
        check_config(config)
