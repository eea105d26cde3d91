"""Gradients reduced to owners and parameters sent from them, on real process groups."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from attnres_train.parallel import pieces
from attnres_train.parallel.gathering import ParameterGather
from attnres_train.parallel.gradients import sum_over
from attnres_train.parallel.ownership import Update
from attnres_train.parallel.pieces import Held, bucketed, make_pieces
from attnres_train.parallel.reduction import GradientReduction

SHAPES = {"idle": (7,), "stack": (3, 2, 4), "matrix": (4, 5), "scalar": (), "low": (2,)}
COSTS = {name: Update(3 if name == "stack" else 1, 1.0, 8) for name in SHAPES}


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            dtype = torch.bfloat16 if name == "low" else torch.float64
            setattr(self, name, nn.Parameter(torch.zeros(shape, dtype=dtype)))
            getattr(self, name).grad_dtype = torch.promote_types(dtype, torch.float32)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return sum((getattr(self, name) * x).sum().double() for name, x in inputs.items())


def inputs(rank: int, seed: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(100 * seed + rank)
    return {n: torch.randn(s, generator=rng).double() for n, s in SHAPES.items() if n != "idle"}


def toy_pieces(toy: Toy, sharded: bool) -> list[pieces.Piece]:
    held = [Held(0, n, p, dist.group.WORLD) for n, p in toy.named_parameters()]
    return make_pieces(held, COSTS, sharded)


def reduce(sharded: bool, large: int, overlapped: bool) -> list[tuple[str, bool, Tensor]]:
    """Runs on every rank: two backward passes, and the gradients of what this rank owns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "LARGE_ELEMENTS", large)
        toy = Toy()
        reduction = GradientReduction(toy_pieces(toy, sharded), dist.get_world_size())
        for _ in range(2):  # the second step is as good as the first
            toy(inputs(dist.get_rank(), 1)).backward()
            if overlapped:
                with reduction.last_backward(0):
                    toy(inputs(dist.get_rank(), 2)).backward()
                    # Alone, each may leave before the idle one is known to be so.
                    assert reduction._started or large > 6
            else:
                toy(inputs(dist.get_rank(), 2)).backward()
            reduction.finish()
            found = [
                (piece.name, piece.counts_here, piece.tensor.grad.clone())
                for piece in reduction.pieces
                if piece.is_mine
            ]
            for piece in reduction.pieces:
                if not piece.is_mine:
                    rest = piece.parameter.grad
                    assert rest is None or not piece.of(rest).any()
            reduction.release()
            assert all(parameter.grad is None for parameter in toy.parameters())
        return found


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize(
    ("sharded", "large", "overlapped"),
    [(True, 1000, True), (True, 6, True), (True, 6, False), (False, 1000, True), (False, 6, False)],
)
def test_owners_have_the_mean_over_replicas(pool, ranks, sharded, large, overlapped):
    by_rank = pool.run(reduce, ranks, sharded, large, overlapped and ranks > 1)
    parts = {name: [] for name in SHAPES}
    for found in by_rank:
        for name, counts, gradient in found:
            if counts:
                parts[name.partition("[")[0]].append((name, gradient))
    for name, shape in SHAPES.items():
        every = [inputs(rank, seed) for rank in range(ranks) for seed in (1, 2)]
        expected = sum(given.get(name, torch.zeros(shape)) for given in every) / ranks
        pieces_of = [gradient for _, gradient in sorted(parts[name], key=lambda part: part[0])]
        owned = pieces_of[0] if len(pieces_of) == 1 else torch.cat(pieces_of)
        assert owned.dtype == (torch.float32 if name == "low" else torch.float64)
        torch.testing.assert_close(owned.double(), expected.double(), rtol=1e-6, atol=1e-6)
    owned = [name for found in by_rank for name, *_ in found]
    assert len(owned) == len(set(owned)) * (1 if sharded else ranks)


class Layers(nn.Module):
    """Three maps one after the other, each with a scale that is read before the first of them, as
    the pseudo-queries of depth attention are."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(3))
        self.scales = nn.ParameterList(torch.ones(4) for _ in range(3))
        for parameter in self.parameters():
            parameter.grad_dtype = torch.float32

    def forward(self, x: Tensor) -> Tensor:
        scales = [scale.view(4) for scale in self.scales]
        for linear, scale in zip(self.maps, scales, strict=True):
            x = linear(x * scale)
        return x

    def pieces(self, sharded: bool = False) -> list[pieces.Piece]:
        pairs = [(f"maps.{i}.weight", f"scales.{i}") for i in range(3)]  # a layer's lie together
        parameters = dict(self.named_parameters())
        held = [Held(0, n, parameters[n], dist.group.WORLD) for pair in pairs for n in pair]
        return make_pieces(held, {n: Update(1, 1.0, 8) for n in parameters}, sharded)


def started(late: bool) -> list[tuple[int, int]]:
    """Runs on every rank: how many buckets had left when each map's gradient came, and how many
    there are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "BUCKET_ELEMENTS", 16)  # a map, or all scales
        layers = Layers()
        names = [f"scales.{i}" for i in range(3)]
        reduction = GradientReduction(layers.pieces(), 2, late=names if late else ())
        seen: list[int] = []
        for linear in layers.maps:
            linear.weight.register_post_accumulate_grad_hook(
                lambda _: seen.append(len(reduction._started))
            )
        loss = layers(torch.randn(3, 4)).sum()
        with reduction.last_backward(0):
            loss.backward()
        buckets = len(reduction._started)
        reduction.finish()
        return [(count, buckets) for count in seen]


def test_gradients_that_come_late_hold_up_no_others(pool):
    assert pool.run(started, 2, True)[0] == [(1, 4), (2, 4), (3, 4)]
    assert pool.run(started, 2, False)[0] == [(0, 6)] * 3


def under_way(limit: int) -> list[int]:
    """Runs on every rank: for how many modules parameters are on their way when each map begins."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "BUCKET_ELEMENTS", limit)
        layers = Layers()
        readers = {f"maps.{i}.weight": linear for i, linear in enumerate(layers.maps)}
        own = layers.pieces(sharded=True)
        sender = ParameterGather({0: layers}, own, lambda piece: readers.get(piece.name, layers))
        seen = []
        for linear in layers.maps:
            linear.register_forward_pre_hook(
                lambda *_: seen.append(sum(map(bool, sender._under_way.values())))
            )
        sender.start()
        layers(torch.ones(1, 4))
        return seen


def test_small_parameters_are_waited_for_where_they_are_read(pool):
    assert pool.run(under_way, 2, 16)[0] == [2, 1, 0]
    assert pool.run(under_way, 2, 1000)[0] == [0, 0, 0]  # all in the first reader's


def gather(large: int) -> list[list[Tensor]]:
    """Runs on every rank: owners change what they own, twice; what all have then."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "LARGE_ELEMENTS", large)
        toy, seen = Toy(), []
        own = toy_pieces(toy, True)
        sender = ParameterGather({0: toy}, own, lambda piece: toy)
        for step in (1, 2):
            sender.wait()
            for index, piece in enumerate(own):
                if piece.is_mine:
                    piece.tensor.detach().fill_(10 * step + index)
            sender.start()
            with torch.no_grad():
                toy(inputs(0, 1)) if step == 1 else sender.wait()
            seen.append([parameter.detach().clone() for parameter in toy.parameters()])
        return seen


@pytest.mark.parametrize("large", [6, 1000])
def test_all_get_what_the_owners_have(pool, large):
    first, *others = pool.run(gather, 3, large)
    assert [float(p.flatten()[0]) for p in first[0]] == [10, 11, 14, 15, 16]
    assert [float(p.flatten()[-1]) for p in first[1]] == [20, 23, 24, 25, 26]
    for other in others:
        for step in (0, 1):
            assert all(map(torch.equal, first[step], other[step]))


def sums() -> tuple[float, float]:
    one = torch.tensor(dist.get_rank() + 1.0)
    return float(sum_over(one.clone())), float(sum_over(one, dist.group.WORLD))


def test_sums_are_over_a_group_or_all(pool):
    assert pool.run(sums, 3) == [(6, 6)] * 3


def bucket_sizes(ranks_of_group: int) -> list[list[str]]:
    toy = Toy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "LARGE_ELEMENTS", 20)
        patch.setattr(pieces, "BUCKET_ELEMENTS", 8)
        return [[piece.name for piece in bucket] for bucket in bucketed(toy_pieces(toy, False))]


def test_buckets_hold_one_kind_and_no_more_than_their_size(pool):
    expected = [["stack"], ["matrix"], ["idle", "scalar"], ["low"]]
    assert pool.run(bucket_sizes, 2, 2)[0] == expected
    assert pool.run(bucket_sizes, 1, 1) == [[]]
