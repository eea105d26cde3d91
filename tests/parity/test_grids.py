"""Every grid x residual x packing x recomputation equals one process in fp64: losses, gradient
norms, every gradient, router loads, and after three steps parameters and the optimizer's state.

    ./scripts/nightly.sh tests/parity

Of the night. In the order of `EVERY` each choice has met each other one halfway.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from tests.parity.expert_runs import SAMPLES, Case, distance, run
from tests.parity.test_experts import check

RELATIVE = 1e-9
GRIDS = [
    Case(tp=2),
    Case(ep=2, dp=2),
    Case(ep=4, dp=4),
    Case(dp=2),
    Case(cp=2),
    Case(cp=3, length=24),
    Case(pp=2, vpp=2),
    Case(tp=2, pp=2),
    Case(ep=2, dp=2, pp=2, vpp=2),
    Case(ep=2, dp=4, pp=2),
    Case(tp=2, ep=2),
    Case(cp=2, pp=2),
    Case(dp=2, tp=2, pp=2),
    Case(ep=2, cp=2),
]
WIDER = [
    Case(ep=2, dp=4),
    Case(cp=4, length=24),
    Case(tp=2, cp=2),
    Case(cp=2, dp=2),
    Case(cp=2, dp=2, ep=2),
    Case(cp=2, dp=2, ep=4),
    Case(cp=2, pp=2, vpp=2),
    Case(tp=2, dp=2, ep=4),
    Case(tp=2, cp=3, length=24),
    Case(cp=2, dp=2, pp=2, vpp=2, ep=2),
    Case(tp=2, cp=2, ep=4, pp=2, vpp=2),
    Case(tp=2, dp=2, pp=2, vpp=2, ep=2),
]
CHOICES = [
    {"recompute": mode, "residual": residual, "packed": packed}
    for other, (row, mode), (column, residual) in product(
        (0, 1), enumerate(("none", "selective", "full")), enumerate(("block", "standard"))
    )
    for packed in [(row + column + other) % 2 == 1]
]
"""The first six have all pairs."""
EVERY = [
    replace(grid, **choices) for some in (GRIDS, WIDER) for choices in CHOICES for grid in some
]


@pytest.mark.nightly
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_it_equals_one_process(short, case):
    alone = run(short, case.alone)
    assert min(alone.norms) > 0.5, "clipping takes part"
    check(run(short, case), alone, RELATIVE)


@pytest.mark.nightly
@pytest.mark.parametrize("grid", GRIDS + WIDER, ids=str)
def test_it_does_where_gradients_go_to_their_owners_alone(short, grid):
    """Who compares gradients has them sent to all ranks, which is another reduction. Micro-batches
    of two samples, where the step has enough for every stage."""
    enough = SAMPLES % (2 * grid.dp * grid.pp) == 0
    case = replace(grid, packed=True, watched=False, samples=1 + enough)
    check(run(short, case), replace(run(short, case.alone), gradients=[]), RELATIVE)


OTHERS = [
    *(Case(residual=kind) for kind in ("full", "input", "bias", "dense", "mhc")),
    *(
        Case(more=(override,))
        for override in (
            "optimizer.kind=adamw",
            "optimizer.per_head=true",
            "model.moe.num_shared_experts=0",
            "model.moe.num_experts_per_token=8",
            "model.moe.first_dense_layers=4",
            "model.full_attention_layers=[1, 2, 3, 4]",
            "model.full_attention_layers=[]",
            "model.residual.norm_gate_rank=4",
            "model.residual.block_sum=unit_outputs",
            "model.residual.values=key",
        )
    ),
]


@pytest.mark.nightly
@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_other_models_and_optimizers_equal_one_process(short, other):
    """Where tensors, samples and experts are shared all at once."""
    case = replace(other, tp=2, cp=2, ep=2, packed=True)
    check(run(short, case), run(short, case.alone), RELATIVE)


PRECISIONS = {
    "fp32": (1e-6, 1e-5, 1e-5),
    "bf16": (2e-3, 0.15, 0.4),
    "bf16_params": (2e-3, 0.15, 0.4),
}
"""How far loss, gradient norm and gradients of the first step may be from fp64, relative."""
LOWER = list(product(GRIDS, PRECISIONS))


def night_but_for_one(grid: Case, precision: str) -> Any:
    marks = [pytest.mark.nightly] * ((grid, precision) != (GRIDS[1], "fp32"))
    return pytest.param(grid, precision, marks=marks, id=f"{grid}-{precision}")


@pytest.mark.parametrize(("grid", "precision"), [night_but_for_one(*one) for one in LOWER])
def test_lower_precisions_are_no_further_from_fp64_than_in_one_process(short, grid, precision):
    """fp32 rounds by 2^-24, and gradients of this model come out with 60 times that, on a grid as
    in one process. bf16 rounds by 2^-9: some tokens of the few go to other experts, so that
    gradients are 0.2 to 0.34 away, those of one process 0.3. So what is asked of a grid is that it
    is no further away than one process; the bounds themselves are those of this model. From the
    second step on two runs differ as two samples do."""
    exact = run(short, replace(grid.alone, packed=True))
    errors = []
    for case in (grid, grid.alone):
        found = run(short, replace(case, packed=True, precision=precision))
        errors.append(distance(found.gradients[0], exact.gradients[0]))
        loss, norm, gradients = PRECISIONS[precision]
        assert found.losses[0] == pytest.approx(exact.losses[0], rel=loss)
        assert found.norms[0] == pytest.approx(exact.norms[0], rel=norm)
        assert errors[-1] < gradients
    assert errors[0] < 1.2 * errors[1]
