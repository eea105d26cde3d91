"""One MoE layer whose experts are on several ranks, against the same layer in one process."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from attnres_train.config.model_schema import MoEConfig
from attnres_train.model.moe.layer import MixtureOfExperts
from attnres_train.parallel import experts
from attnres_train.parallel.experts import ExpertExchange

HIDDEN, EXPERTS, TOP = 6, 8, 3
CONFIG = MoEConfig(num_experts=EXPERTS, num_experts_per_token=TOP, intermediate_size=5)
TO_ONE = [3.0, 2, 1, 0, 0, 0, 0, 0]
"""A bias that sends every token to experts 0, 1 and 2."""


def layer(bias: Sequence[float], exchange: ExpertExchange | None = None) -> MixtureOfExperts:
    """The layer, or what of it is on this rank."""
    torch.manual_seed(0)
    whole = MixtureOfExperts(HIDDEN, CONFIG).double()
    for parameter in whole.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    whole.gate.e_score_correction_bias.copy_(torch.tensor(bias))
    if exchange is None:
        return whole
    mine, here = MixtureOfExperts(HIDDEN, CONFIG, exchange).double(), exchange.experts
    state = whole.state_dict()
    for name in ("w1", "w2", "w3"):
        state[f"experts.{name}"] = state[f"experts.{name}"][here.start : here.stop]
    mine.load_state_dict(state)
    return mine


def inputs(counts: Sequence[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, HIDDEN, dtype=torch.float64, generator=generator) for n in counts]


def outputs(moe: MixtureOfExperts, x: Tensor) -> dict[str, Tensor]:
    x.requires_grad_()
    y, load = moe(x)
    (y * torch.arange(1.0, HIDDEN + 1)).sin().sum().backward()
    gradients = {name: p.grad for name, p in moe.named_parameters()}
    return {"y": y.detach(), "load": load, "x": x.grad, **gradients}


def on_a_rank(counts: Sequence[int], bias: Sequence[float]) -> tuple[dict[str, Tensor], int]:
    exchange = ExpertExchange(EXPERTS, dist.group.WORLD)
    return outputs(layer(bias, exchange), inputs(counts)[dist.get_rank()]), exchange.bytes_sent


def least_bytes(counts: Sequence[int], bias: Sequence[float]) -> list[int]:
    """What each rank sends at least, counted token by token: a token and the gradient of its sum go
    once to every other rank with an expert of it, and sum and gradient come back."""
    gate, ranks, share = layer(bias).gate, len(counts), EXPERTS // len(counts)
    sent = [0] * ranks
    for home, x in enumerate(inputs(counts)):
        for chosen in gate(x)[1].tolist():
            there = {expert // share for expert in chosen} - {home}
            pairs = [expert // share for expert in chosen if expert // share != home]
            sent[home] += 2 * len(there) * HIDDEN * 8 + len(pairs) * (4 + 8)  # told; weights
            for rank in there:
                sent[rank] += 2 * HIDDEN * 8
            for rank in pairs:
                sent[rank] += 8  # gradients of the weights
    return [own + (ranks - 1) * 2 * 8 for own in sent]  # the sizes themselves


@pytest.mark.parametrize(
    ("counts", "bias"),
    [
        ([7, 7], [0.0] * EXPERTS),
        ([7, 0], [0.0] * EXPERTS),
        ([5, 9, 1, 4], [0.0] * EXPERTS),
        ([5, 0, 2, 4], TO_ONE),
        ([0, 3, 0, 0], TO_ONE[::-1]),
        ([0, 0], [0.0] * EXPERTS),
    ],
    ids=["even", "none-here", "uneven", "all-to-one", "one-has-all", "nobody"],
)
def test_equals_one_process(pool, counts, bias):
    whole = outputs(layer(bias), torch.cat(inputs(counts)))
    found = [of for of, _ in pool.run(on_a_rank, len(counts), counts, bias)]
    for name, expected in whole.items():
        parts = [of[name] for of in found]
        if name in ("y", "x") or name.startswith("experts."):
            mine = torch.cat(parts)  # the own tokens, the own experts
        else:
            mine = torch.stack(parts).sum(0)  # the same on all, for the own tokens
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("counts", [[7, 7], [5, 0, 2, 4]])
def test_no_byte_more_than_needed(pool, counts):
    bias = [0.0] * EXPERTS
    sent = [sent for _, sent in pool.run(on_a_rank, len(counts), counts, bias)]
    assert sent == least_bytes(counts, bias)


def order_of_events() -> list[str]:
    """What a rank does in a forward and a backward pass."""
    events: list[str] = []
    exchange = ExpertExchange(EXPERTS, dist.group.WORLD)
    moe = layer([0.0] * EXPERTS, exchange)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("start", "wait"):
            method = getattr(experts._Flight, name)
            patch.setattr(
                experts._Flight,
                name,
                lambda *args, name=name, method=method: (events.append(name), method(*args))[1],
            )
        assert moe.shared_experts is not None
        moe.shared_experts.register_forward_hook(lambda *_: events.append("shared"))
        moe.experts.register_forward_hook(lambda *_: events.append("experts"))
        y, _ = moe(inputs([9, 9])[dist.get_rank()].requires_grad_())
        events.append("backward")
        moe.shared_experts.down_proj.weight.register_hook(lambda _: events.append("shared"))
        moe.experts.w1.register_hook(lambda _: events.append("experts"))
        y.sum().backward()
    return events


def test_shared_experts_are_computed_while_tokens_are_under_way(pool):
    there, back = ["start", "shared", "wait"], ["start", "wait"]
    events = [*there, "experts", *back, "backward", *back, "experts", *there]
    assert pool.run(order_of_events, 2) == [events] * 2


def groups_refuse() -> str:
    with pytest.raises(ValueError, match="8 experts cannot be shared by 3 ranks") as caught:
        ExpertExchange(8, dist.group.WORLD)
    return str(caught.value)


def test_experts_that_cannot_be_shared(pool):
    assert len(set(pool.run(groups_refuse, 3))) == 1
