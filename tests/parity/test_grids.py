"""Every grid x residual x packing x recomputation equals one process in fp64: losses, gradient
norms, every gradient, router loads, and after three steps parameters and the optimizer's state.

Of the night. In the order of `EVERY` each choice has met each other one halfway.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from tests.parity.expert_runs import Case, run
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
    """Who compares gradients has them sent to all ranks, which is another reduction."""
    case = replace(grid, packed=True, watched=False)
    check(run(short, case), replace(run(short, case.alone), gradients=[]), RELATIVE)
