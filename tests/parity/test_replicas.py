"""Data-parallel steps, with and without a pipeline, equal those of one process."""

from __future__ import annotations

from functools import cache
from itertools import product

import pytest
import torch

from attnres_train.data.loader import BatchSource
from attnres_train.model.moe.layer import router_loads
from attnres_train.parallel import pieces
from attnres_train.parallel.gathering import ParameterGather
from attnres_train.parallel.reduction import GradientReduction
from attnres_train.training.batches import StepBatches
from attnres_train.training.trainer import Trainer
from tests.parity.pool import RankFailedError
from tests.parity.steps import STEPS, Steps, differences, once, run_steps
from tests.tiny import free_port, grid

RELATIVE = 1e-9
COMMON = [
    "optimizer.ns_dtype=fp64",
    "train.micro_batch_size=1",
    "train.global_batch_size=8",
    "train.clip_grad=0.5",
    "data.reset_at_documents=true",
    "data.mask_document_ends=true",
]
MODES = ("none", "selective", "full")
GRIDS = {
    "DP2": (2, 1, 1, 1),
    "DP4": (4, 1, 1, 1),
    "DP2-PP2V2": (2, 2, 2, 1),
    "DP4-EP2": (4, 1, 1, 2),
    "DP2-EP2-PP2V2": (2, 2, 2, 2),
}
"""Replicas, stages, virtual stages, ranks that share the experts."""
Case = tuple[str, str, str, str]
"""Grid, optimizer, residual, recomputation."""
CASES: list[Case] = [
    ("DP2", "muon", "block", "none"),
    ("DP4", "muon", "standard", "selective"),
    ("DP2-PP2V2", "adamw", "standard", "selective"),
    ("DP4-EP2", "muon", "block", "none"),
    ("DP2-EP2-PP2V2", "muon", "block", "full"),
]
ALL = list(product(GRIDS, ("muon", "adamw"), ("block", "standard"), MODES))


@pytest.fixture(scope="module")
def run(pool, tiny):
    """Steps by rank, of a grid; the same ones are run once."""

    @cache
    def steps(place: str, *overrides: str, **options) -> list[Steps]:
        replicas, stages, virtual, experts = GRIDS.get(place, (1, 1, 1, 1))
        shared = f"parallel.expert_model_parallel_size={experts}"
        arguments = [*COMMON, *grid(stages, virtual), shared, *overrides]
        call = (str(tiny.path), arguments, free_port())
        return pool.run(run_steps, replicas * stages, *call, *options.values())

    return steps


def compare(run, case: Case, *overrides: str) -> None:
    place, optimizer, residual, recompute = case
    model = (f"optimizer.kind={optimizer}", f"model.residual.kind={residual}")
    (expected,) = run("one", *model)
    found = run(place, *model, f"train.recompute={recompute}", *overrides)
    assert differences(found, expected, RELATIVE) == []
    assert expected.losses[2] < expected.losses[0]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_three_steps_equal_those_of_one_process(run, case):
    compare(run, case)


@pytest.mark.nightly
@pytest.mark.parametrize("case", [case for case in ALL if case not in CASES], ids="-".join)
def test_every_grid_equals_one_process(run, case):
    compare(run, case)


def in_place(patch: pytest.MonkeyPatch) -> None:
    """Matrices travel alone, as large ones do, and the rest in several buckets."""
    patch.setattr(pieces, "LARGE_ELEMENTS", 300)
    patch.setattr(pieces, "BUCKET_ELEMENTS", 1000)


def test_large_ones_in_place_too(run):
    model = ("optimizer.kind=muon", "model.residual.kind=block")
    (expected,) = run("one", *model)
    found = run("DP4-EP2", *model, "train.recompute=full", steps=STEPS, fault=in_place)
    assert differences(found, expected, RELATIVE) == []


def pass_over_a_step(patch: pytest.MonkeyPatch) -> None:
    """The first step is made once more, without an update: as if its gradients were not finite."""
    step = Trainer.train_step

    def train_step(self):
        if self.progress.step == 0:
            parts, update = self.parts, self.parts.optimizer
            batches = parts.data.micro_batches(0, self.ranks.dp_rank, self.ranks.dp_size)
            inputs = self.batches.to_device(batches, self.batches.mean_loss_tokens(batches))
            parts.engine.train_step(inputs, update.reduction.last_backward)
            update.reduction.finish()
            update.zero_grad()
            for load in (load for chunk in self.chunks for load in router_loads(chunk)):
                load.zero_()
        return step(self)

    patch.setattr(Trainer, "train_step", train_step)


def test_a_step_may_be_passed_over(run):
    model = ("optimizer.kind=muon", "model.residual.kind=block")
    expected, found = run("DP2", *model), run("DP2", *model, steps=STEPS, fault=pass_over_a_step)
    for before, after in zip(expected, found, strict=True):
        assert after.losses == before.losses and after.grad_norms == before.grad_norms
        assert all(torch.equal(after.parameters[n], p) for n, p in before.parameters.items())


def turn_round(patch: pytest.MonkeyPatch) -> None:
    """The micro-batches of a step come in the reverse order."""
    deal = BatchSource.micro_batches
    patch.setattr(BatchSource, "micro_batches", lambda *place: deal(*place)[::-1])


@pytest.mark.parametrize(
    "place", ["one", *(pytest.param(p, marks=pytest.mark.nightly) for p in list(GRIDS)[2:])]
)
def test_the_order_of_micro_batches_is_that_of_sums_alone(run, place):
    model = ("optimizer.kind=muon", "model.residual.kind=block")
    (expected,) = run("one", *model)
    found = run(place, *model, steps=STEPS, fault=turn_round)
    assert differences(found, expected, RELATIVE) == []
    if place == "one":  # it was turned round: sums in fp64 are not the same to the bit
        assert found[0].grad_norms != expected.grad_norms


def test_without_shares_too(run):
    compare(run, CASES[0], "optimizer.sharded=false")


@pytest.mark.parametrize("place", ["DP4", "DP2-PP2V2", "DP4-EP2"])
def test_every_state_is_kept_once_and_shares_are_even(run, place):
    (one,) = run("one", "optimizer.kind=muon", "model.residual.kind=block")
    by_rank = run(place, "optimizer.kind=muon", "model.residual.kind=block", "train.recompute=full")
    states = [steps.states for steps in by_rank]
    assert once(states).keys() == one.states.keys()
    held = [sum(tensor.nbytes for tensor in mine.values()) for mine in states]
    assert sum(held) == sum(tensor.nbytes for tensor in one.states.values())
    assert max(held) < 1.1 * sum(held) / len(held)


def drop_a_gradient(patch: pytest.MonkeyPatch) -> None:
    """What one micro-batch has added on one replica is lost for one matrix."""
    reduced = GradientReduction.last_backward

    def without(self, chunk):
        if torch.distributed.get_rank() == 1:
            parameter = next(p.parameter for p in self.pieces if "q_proj" in p.name)
            parameter.grad.zero_()
        return reduced(self, chunk)

    patch.setattr(GradientReduction, "last_backward", without)


def count_twice(patch: pytest.MonkeyPatch) -> None:
    """A matrix is counted on every replica."""
    first = Trainer.__init__

    def init(self, config, ranks, parts, *more):
        first(self, config, ranks, parts, *more)
        counted = parts.optimizer.counted
        parts.optimizer.counted = [*counted, counted[-1]]

    patch.setattr(Trainer, "__init__", init)


def forget_the_gather(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ParameterGather, "start", lambda self: None)


def divide_by_own_tokens(patch: pytest.MonkeyPatch) -> None:
    def own(self, batches):
        return sum(batch["loss_mask"].sum(dtype=torch.float64) for batch in batches) / len(batches)

    patch.setattr(StepBatches, "mean_loss_tokens", own)


def reduce_too_early(patch: pytest.MonkeyPatch) -> None:
    """The first backward pass is taken for the last."""
    from attnres_train.pipeline.plan.program import Program

    made = Program.__init__

    def init(self, plan, schedule, rank):
        made(self, plan, schedule, rank)
        passes = [action for action in reversed(schedule[rank]) if action.kind == "B"]
        self.last_backward = {action.chunk: action for action in passes}

    patch.setattr(Program, "__init__", init)


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (drop_a_gradient, ["gradient of ", "grad_norms of rank 0", "parameter "]),
        (count_twice, ["grad_norms of rank 0"]),
        (forget_the_gather, ["replicas of ", "losses of rank 1"]),
        (divide_by_own_tokens, ["gradient of ", "losses of rank 0", "parameter "]),
    ],
)
def test_faults_are_found(run, fault, found):
    model = ("optimizer.kind=muon", "model.residual.kind=block")
    (expected,) = run("one", *model)
    told = differences(run("DP2", *model, steps=STEPS, fault=fault), expected, RELATIVE)
    for kind in found:
        assert any(line.startswith(kind) for line in told), (kind, told)


def test_a_gradient_that_comes_after_its_reduction_is_told(run):
    with pytest.raises(RankFailedError, match="was reduced before it was whole"):
        run("DP2", "model.residual.kind=block", steps=1, fault=reduce_too_early)
