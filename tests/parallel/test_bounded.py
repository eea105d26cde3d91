"""The exchange with static shapes, against the exact one, and what finds no room."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from attnres_train.model.moe.permutation import combine, dispatch
from attnres_train.parallel.bounded import BoundedExchange, Slots, SlottedPairs
from attnres_train.parallel.experts import ExpertExchange
from tests.parallel.test_experts import CONFIG, EXPERTS, TO_ONE, inputs, layer, outputs

ANYWHERE = [0.0] * EXPERTS


def on_a_rank(tokens: int, bias: Sequence[float], factor: float) -> tuple[dict[str, Tensor], int]:
    exchange = BoundedExchange(CONFIG, dist.group.WORLD, factor)
    mine = inputs([tokens] * dist.get_world_size())[dist.get_rank()]
    return outputs(layer(bias, exchange), mine), int(exchange.overflow)


@pytest.mark.parametrize(
    ("ranks", "tokens", "bias", "factor"),
    [(2, 7, ANYWHERE, 1.5), (4, 9, ANYWHERE, 4), (4, 5, TO_ONE, 8), (2, 0, ANYWHERE, 1)],
    ids=["2", "4", "all-to-one", "no-tokens"],
)
def test_equals_one_process_where_there_is_room(pool, ranks, tokens, bias, factor):
    whole = outputs(layer(bias), torch.cat(inputs([tokens] * ranks)))
    results = pool.run(on_a_rank, ranks, tokens, bias, factor)
    assert [overflow for _, overflow in results] == [0] * ranks
    for name, expected in whole.items():
        parts = [found[name] for found, _ in results]
        whole_of_parts = name in ("y", "x") or name.startswith("experts.")
        mine = torch.cat(parts) if whole_of_parts else torch.stack(parts).sum(0)
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize(("factor", "bias"), [(1.0, TO_ONE), (2.0, TO_ONE)])
def test_what_finds_no_room_is_counted_and_makes_the_loss_nan(pool, factor, bias):
    results = pool.run(on_a_rank, 4, 32, bias, factor)
    assert sum(overflow for _, overflow in results) > 0
    assert any(found["y"].isnan().any() for found, _ in results)


def overflow_of_rows_and_pairs() -> list[tuple[int, int]]:
    """(C, P) of the room for 32 tokens by factor."""
    exchange = BoundedExchange(CONFIG, dist.group.WORLD, 1.0)
    rooms = []
    for factor in (1.0, 1.5, 100.0):
        exchange.factor = factor
        rooms.append(exchange.room(32, 3))
    return rooms


def test_the_room_is_the_factor_times_an_even_load_and_never_more_than_there_can_be(pool):
    # Of 8 experts 2 are on a rank of 4; of 56 choices of three 20 have none of those.
    reached = 1 - 20 / 56
    expected = [(-int(-f * 32 * reached // 1), int(f * 32 * 3)) for f in (1.0, 1.5)]
    expected.append((32, 4 * 32 * 2))  # every token has at most two experts there
    assert pool.run(overflow_of_rows_and_pairs, 4) == [expected] * 4


class Synchronising(TorchDispatchMode):
    """Notes what would wait for a device: values read on the host, shapes that depend on values."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "item", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).split(".")[1]
        if any(name.startswith(wait) for wait in self.WAITS):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class WithoutToList(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.__bool__):
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


def waits(bounded: bool) -> list[str]:
    """What of the exchange itself reads on the host: there, experts, back, and backward."""
    group = dist.group.WORLD
    exchange = BoundedExchange(CONFIG, group, 2) if bounded else ExpertExchange(EXPERTS, group)
    x = inputs([9, 9])[dist.get_rank()].requires_grad_()
    weights, chosen = layer(ANYWHERE).gate(x)
    with Synchronising() as ops, WithoutToList() as calls:
        sent = exchange.send(x, chosen, weights, torch.float64)
        here = sent.arrived()
        rows = dispatch(here.tokens, here.pairs)
        rows = rows * here.weights.index_select(0, here.pairs.order).unsqueeze(-1)
        y = sent.back(combine(rows, here.pairs))
    with Synchronising() as back:
        y.sum().backward()
    return ops.found + calls.found + back.found


def test_the_host_reads_nothing(pool):
    assert pool.run(waits, 2, True) == [[], []]
    assert all(pool.run(waits, 2, False))  # the exact one does


def without_gradients() -> tuple[Tensor, int]:
    exchange = BoundedExchange(CONFIG, dist.group.WORLD, 1.0)
    with torch.no_grad():
        y, _ = layer(TO_ONE, exchange)(inputs([32, 32])[dist.get_rank()])
    return y, int(exchange.overflow)


def test_validation_always_has_room(pool):
    whole, _ = layer(TO_ONE)(torch.cat(inputs([32, 32])))
    results = pool.run(without_gradients, 2)
    assert [overflow for _, overflow in results] == [0, 0]
    torch.testing.assert_close(torch.cat([y for y, _ in results]), whole.detach())


def test_empty_rows_are_not_read():
    """Whatever is in them: a grouped matmul leaves them as they are."""
    slots = Slots.of(torch.tensor([[0, 5], [2, 3], [5, 5]]), 5)
    assert slots.token.tolist() == [0, 0, 1, 1, 0]
    assert slots.filled.tolist() == [True, False, True, True, False]
    rows = torch.tensor([[1.0], [torch.nan], [2.0], [4.0], [torch.nan]])
    assert slots.collect(rows).tolist() == [[1], [6], [0]]


def test_pairs_are_sorted_by_expert_and_cut_where_the_room_ends():
    told = torch.tensor([[1, 0], [2, 1], [0, 2]])  # 2: none
    pairs, overflow = SlottedPairs.sort(told, 2, 5)
    assert (pairs.order[:4].tolist(), pairs.ends.tolist(), int(overflow)) == (
        [1, 4, 0, 3],
        [2, 4],
        0,
    )
    assert pairs.token[:4].tolist() == [0, 2, 0, 1]
    pairs, overflow = SlottedPairs.sort(told, 2, 3)
    assert (pairs.order.tolist(), pairs.ends.tolist(), int(overflow)) == ([1, 4, 0], [2, 3], 1)
    assert pairs.collect(torch.ones(3, 1)).tolist() == [[2], [0], [1]]
