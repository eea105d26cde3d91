"""Updates of parameters of which tensor ranks have parts, against one process."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from attnres_train.errors import UserError
from attnres_train.parallel.matrices import Dealt, MatrixDeal, matrix_exchange
from attnres_train.parallel.pieces import Piece
from tests.parallel.synthetic import SHAPES, STEPS, Outcome, trained
from tests.parity.pool import RankFailedError
from tests.parts import made_whole


def worst(found: list[Outcome], expected: list[Outcome]) -> float:
    ours, theirs = (
        made_whole((item for outcome in by_rank for item in outcome.parameters), once=False)
        for by_rank in (found, expected)
    )
    assert all(outcome.norms == found[0].norms for outcome in found)
    errors = [abs(a / b - 1) for a, b in zip(found[0].norms, expected[0].norms, strict=True)]
    errors += [float((ours[n] - theirs[n]).norm() / theirs[n].norm()) for n in SHAPES]
    return max(errors)


@pytest.fixture(scope="module")
def alone(pool):
    found: dict[str, list[Outcome]] = {}

    def run(**options: Any) -> list[Outcome]:
        key = repr(options)
        if key not in found:
            found[key] = pool.run(trained, 1, 1, 1, options)
        return found[key]

    return run


@pytest.mark.parametrize("options", [{}, {"per_head": True}, {"kind": "adamw"}], ids=str)
@pytest.mark.parametrize(
    ("ranks", "tensor", "experts", "sharded"),
    [(2, 2, 1, True), (2, 2, 2, False), (4, 2, 2, True), (4, 4, 4, True), (4, 2, 1, False)],
)
def test_any_grid_updates_as_one_process_does(
    pool, alone, ranks, tensor, experts, sharded, options
):
    found = pool.run(trained, ranks, tensor, experts, {**options, "sharded": sharded})
    assert worst(found, alone(**options)) < 1e-12
    for rank, outcome in enumerate(found):  # tensor ranks are adjacent
        assert outcome.dealt == found[rank - rank % tensor].dealt
    total = alone(**options)[0].state_bytes
    if sharded and tensor * experts != 4:
        # Experts and what tensor ranks share is here in part; of the rest replicas own a share.
        assert max(outcome.state_bytes for outcome in found) < 1.35 * total / ranks


def trained_in_small_batches(options: dict[str, Any]) -> Outcome:
    with mock.patch("attnres_train.optim.muon._CPU_BATCH", 1):
        return trained(2, 1, options)


def test_batches_travel_one_by_one_and_their_work_is_even(pool, alone):
    found = pool.run(trained_in_small_batches, 2, {})
    assert worst(found, alone()) < 1e-12
    per_step = found[0].dealt[: len(found[0].dealt) // STEPS]
    assert found[0].dealt == per_step * STEPS, "a resumed run would batch matrices otherwise"
    # Three by columns, two by rows, the map to heads and the wide one: none is made whole twice.
    assert sorted(map(sum, per_step)) == [1, 1, 1, 2, 2]
    first, second = (sum(counts) for counts in zip(*per_step, strict=True))
    assert abs(first - second) <= 1


def send(parts: list[int], axis: int) -> tuple[Tensor, Tensor]:
    """Runs on every rank: matrices made whole, and their negatives sent back."""
    size, rank = dist.get_world_size(), dist.get_rank()
    wholes = torch.arange(1.0, 1 + sum(parts) * 24 * size).view(sum(parts), -1, 4 * size)
    deal = MatrixDeal(dist.group.WORLD)
    arrived, returned = [], []
    for batch in wholes.split(parts):
        sent = deal.send(batch.chunk(size, dim=axis)[rank], axis)
        arrived.append(sent.wholes())
        returned.append(sent.back(-arrived[-1]))
        assert torch.equal(returned[-1], -batch.chunk(size, dim=axis)[rank])
    return torch.cat(arrived), wholes


@pytest.mark.parametrize("axis", [-2, -1])
def test_each_matrix_is_whole_on_one_rank(pool, axis):
    by_rank = pool.run(send, 3, [1, 1, 5, 2], axis)
    seen = torch.cat([arrived for arrived, _ in by_rank])
    wholes = by_rank[0][1]
    assert [len(arrived) for arrived, _ in by_rank] == [3, 3, 3]
    order = seen[:, 0, 0].argsort()
    assert torch.equal(seen[order], wholes)


def count_half(*call: Any) -> Outcome:
    counts = Piece.counts_here.fget
    with mock.patch.object(
        Piece, "counts_here", property(lambda self: counts(self) and self.name != "column_0")
    ):
        return trained(*call)


def in_the_wrong_place(*call: Any) -> Outcome:
    """Each rank takes what comes back for another."""

    def turned(self: Any, results: Tensor) -> Tensor:
        return back(self, results.roll(results.shape[self._axis] // 2, self._axis))

    back = Dealt.back
    with mock.patch.object(Dealt, "back", turned):
        return trained(*call)


def scaled_by_the_part(*call: Any) -> Outcome:
    """Newton-Schulz of the part that is here."""
    with mock.patch("tests.parallel.synthetic.matrix_exchange", lambda *_: None):
        return trained(*call)


@pytest.mark.parametrize("fault", [count_half, in_the_wrong_place, scaled_by_the_part])
def test_faults_are_seen(pool, alone, fault):
    assert worst(pool.run(fault, 2, 2, 1, {}), alone()) > 1e-4


def other_matrices() -> None:
    name = f"column_{dist.get_rank()}"
    matrix_exchange([(name, torch.zeros(4, 12))], dist.group.WORLD)


def test_ranks_that_would_wait_for_each_other_are_told_at_the_start(pool):
    with pytest.raises(RankFailedError, match="do not update parts of the same matrices"):
        pool.run(other_matrices, 2)


def with_own_kind() -> str:
    try:
        trained(2, 1, {"kind": "tests.optim.lion:LionKind"})
    except UserError as error:
        return str(error)
    return ""


def test_a_kind_that_knows_of_no_parts_is_refused(pool):
    told = pool.run(with_own_kind, 2)[0]
    assert "lion:LionKind does not say that it can update a part of column_0" in told
