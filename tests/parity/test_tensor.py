"""Steps whose heads, widths, vocabulary and stream are split equal those of one process."""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import NamedTuple

import pytest
import torch.distributed as dist
from torch import Tensor

from attnres_train.model.parts import is_part
from attnres_train.parallel import tensor
from attnres_train.parallel.ranks import Ranks
from attnres_train.parallel.reduction import GradientReduction
from attnres_train.pipeline.plan.layout import make_layout
from attnres_train.pipeline.plan.transport_plan import TransportPlan
from attnres_train.pipeline.run.stage import Stage
from tests.parity.pool import RankFailedError
from tests.parity.steps import STEPS, Fault, Steps, differences, run_steps
from tests.tiny import free_port, grid

RELATIVE = 1e-9
COMMON = [
    # AdamW divides by what a gradient is: where that is little, by its rounding. Long steps turn it
    # into another model, of one process with itself as well.
    "optimizer.lr=0.001",
    "optimizer.eps=1e-6",
    "model.moe.bias_update_rate=0.05",
    "train.seq_length=16",
    "train.micro_batch_size=2",
    "train.global_batch_size=8",
    "train.clip_grad=0.5",
]


class Grid(NamedTuple):
    """Ranks that share tensors, replicas, stages, virtual stages, ranks that share experts."""

    tensor: int = 1
    data: int = 1
    stages: int = 1
    virtual: int = 1
    experts: int = 1

    @property
    def ranks(self) -> int:
        return self.tensor * self.data * self.stages


GRIDS = {
    "TP2": Grid(2),
    "TP2-PP2": Grid(2, stages=2),
    "TP2-PP2V2": Grid(2, stages=2, virtual=2),
    "TP2-EP2": Grid(2, experts=2),
    "TP2-DP2": Grid(2, data=2),
    "TP2-DP2-EP2": Grid(2, data=2, experts=2),
    "TP2-DP2-EP4": Grid(2, data=2, experts=4),
    "TP2-DP2-PP2": Grid(2, data=2, stages=2),
    "TP2-DP2-EP4-PP2V2": Grid(2, data=2, stages=2, virtual=2, experts=4),
}
Case = tuple[str, str, str, str]
"""Grid, residual, samples (of one document, with AdamW; packed, with Muon), recomputation."""
CASES: list[Case] = [
    ("TP2", "block", "packed", "none"),
    ("TP2-PP2", "block", "packed", "full"),
    ("TP2-DP2-EP4", "standard", "whole", "full"),
]
ALL = product(GRIDS, ("block", "standard"), ("whole", "packed"), ("none", "selective", "full"))
OTHERS = [case for case in ALL if case not in CASES]


@pytest.fixture(scope="module")
def run(pool, tiny):
    """Steps by rank, of a grid; the same ones are run once."""

    @cache
    def steps(
        place: str, residual: str, samples: str, *overrides: str, fault: Fault | None = None
    ) -> list[Steps]:
        on = GRIDS.get(place, Grid())
        arguments = [
            *COMMON,
            *grid(on.stages, on.virtual),
            f"parallel.tensor_model_parallel_size={on.tensor}",
            f"parallel.expert_model_parallel_size={on.experts}",
            f"model.residual.kind={residual}",
            f"data.reset_at_documents={str(samples == 'packed').lower()}",
            f"data.mask_document_ends={str(samples == 'packed').lower()}",
            f"optimizer.kind={'muon' if samples == 'packed' else 'adamw'}",
            "optimizer.ns_dtype=fp64",
            *overrides,
        ]
        return pool.run(run_steps, on.ranks, str(tiny.path), arguments, free_port(), STEPS, fault)

    return steps


def compare(run, case: Case, *overrides: str) -> None:
    place, residual, samples, recompute = case
    (expected,) = run("one", residual, samples, *overrides)
    found = run(place, residual, samples, f"train.recompute={recompute}", *overrides)
    assert differences(found, expected, RELATIVE) == []
    assert min(expected.grad_norms) > 0.5, "clipping takes part"
    assert any(is_part(name) for steps in found for name in steps.parameters)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_three_steps_equal_those_of_one_process(run, case):
    compare(run, case)


def test_gates_on_norms_are_learned_from_all_tokens(run):
    """Each rank has all of a gate and a part of the tokens."""
    compare(run, ("TP2", "block", "packed", "none"), "model.residual.norm_gate_rank=3")


@pytest.mark.nightly
@pytest.mark.parametrize("case", OTHERS, ids="-".join)
def test_every_grid_equals_one_process(run, case):
    compare(run, case)


def test_a_hop_carries_each_block_once(run):
    """A rank's part of it, to the rank of the next stage that has the same part."""
    place, (_, residual, samples, recompute) = "TP2-PP2", CASES[1]
    found = run(place, residual, samples, f"train.recompute={recompute}")
    plan = TransportPlan(make_layout(4, 3, 2, 1, "even"))
    tokens, width, number = 8 * 16, 32, 8  # of the step's samples; bytes of a number
    whole = 2 * plan.units().exact * tokens * width * number
    assert all(steps.p2p_bytes == [whole] * STEPS for steps in found)


def forget_the_sum(patch: pytest.MonkeyPatch) -> None:
    """Each rank keeps its own part of the sums for its tokens."""

    def own(x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return x.chunk(group.size(), 1)[group.rank()].contiguous()

    patch.setattr(tensor, "_scattered", own)


def double_a_gradient(patch: pytest.MonkeyPatch) -> None:
    """Of a parameter that all have whole every rank has all of the gradient, not its part."""
    made = GradientReduction.__init__

    def summed(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient

    def init(self, pieces, *more, **options):
        made(self, pieces, *more, **options)
        piece = next(piece for piece in pieces if piece.name.endswith("f_a_proj.weight"))
        piece.parameter.register_hook(lambda gradient: summed(gradient))

    patch.setattr(GradientReduction, "__init__", init)


def sum_over_too_many(patch: pytest.MonkeyPatch) -> None:
    """Split tensors as if all ranks had the same part."""
    patch.setattr(Ranks, "replicas", lambda self, rule: self.stage)


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (forget_the_sum, ["gradient of ", "losses of rank 0", "parameter "]),
        (double_a_gradient, ["gradient of ", "grad_norms of rank 0", "parameter "]),
    ],
)
def test_faults_are_found(run, fault, found):
    (expected,) = run("one", "block", "whole")
    told = differences(run("TP2", "block", "whole", fault=fault), expected, RELATIVE)
    for kind in found:
        assert any(line.startswith(kind) for line in told), (kind, told)


def test_sums_over_too_many_are_found(run):
    """A part is counted nowhere; with owners they do not come to the same matrices."""
    (expected,) = run("one", "block", "whole")
    found = run("TP2", "block", "whole", "optimizer.sharded=false", fault=sum_over_too_many)
    with pytest.raises(ValueError, match="is missing"):
        differences(found, expected, RELATIVE)
    with pytest.raises(RankFailedError, match="do not update parts of the same matrices"):
        run("TP2", "block", "packed", fault=sum_over_too_many)


def whole_hops(patch: pytest.MonkeyPatch) -> None:
    """Room for all tokens is waited for, as if the stream had them."""
    made = Stage.__init__
    patch.setattr(Stage, "__init__", lambda self, *args: made(self, *args[:-1]))


def test_a_hop_of_full_length_is_found(run):
    with pytest.raises(RankFailedError):
        run("TP2-PP2", "block", "packed", fault=whole_hops)
