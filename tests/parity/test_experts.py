"""Training with shared experts equals one process: losses, norms, gradients and what is learnt."""

from __future__ import annotations

import pytest
import torch

from attnres_train.planning.costs import CostModel
from tests.parity.expert_runs import (
    FAULTS,
    SAMPLES,
    STEPS,
    Case,
    Outcome,
    run,
    run_in_turns,
    worst,
)
from tests.tiny import column

CASES = [
    pytest.param(Case(ep=2, dp=2), marks=pytest.mark.nightly),
    Case(ep=2, dp=2, pp=2, vpp=2, packed=True, recompute="selective"),
    Case(ep=2, dp=4, packed=True, residual="standard"),
    Case(ep=2, dp=2, room=4, packed=True),
]


def check(found: Outcome, expected: Outcome, tolerance: float) -> None:
    assert found.losses == pytest.approx(expected.losses, rel=tolerance)
    assert found.norms == pytest.approx(expected.norms, rel=tolerance)
    for step, (mine, theirs) in enumerate(zip(found.gradients, expected.gradients, strict=True), 1):
        assert worst(mine, theirs) < tolerance, f"gradients of step {step}"
    for mine, theirs in zip(found.balance, expected.balance, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-12)
    assert worst(found.saved, expected.saved) < tolerance, "what was saved"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_everything_equals_one_process(tiny, case):
    alone = run(tiny, case.alone)
    assert min(alone.norms) > 0.5, "clipping takes part"
    check(run(tiny, case), alone, 1e-9)


@pytest.mark.parametrize(
    "fault",
    [pytest.param(n, marks=[pytest.mark.nightly] * (i > 0)) for i, n in enumerate(FAULTS)],
)
def test_faults_are_found(tiny, fault):
    case = Case(ep=2, dp=2)
    with pytest.raises(AssertionError):
        check(run(tiny, case, fault), run(tiny, case.alone), 1e-9)


@pytest.mark.parametrize(
    "case",
    [Case(ep=2, dp=2), pytest.param(Case(tp=2, precision="fp32"), marks=pytest.mark.nightly)],
    ids=str,
)
def test_a_resumed_run_repeats_every_bit(short, case):
    resumed = run_in_turns(short, f"resumed-{case}", [case, case])
    whole = run(short, case)
    assert resumed.losses == whole.losses
    assert all(torch.equal(resumed.saved[name], value) for name, value in whole.saved.items())


def test_any_grid_goes_on_from_any_other(tiny):
    """State of the optimizer included: the steps after the first ones would differ else."""
    grids = [Case(ep=4, dp=4), Case(), Case(ep=2, dp=2, pp=2, vpp=2)]
    check(run_in_turns(tiny, "in-turns", grids), run(tiny, Case()), 1e-9)


def test_steps_for_which_there_is_no_room_are_passed_over_by_all(tiny):
    """The room of an even load, which that of the first steps is not."""
    case = Case(ep=2, dp=2, room=1.0, precision="fp32")
    with pytest.raises(Exception, match=r"2 such steps in a row; train.max_skipped_") as caught:
        tiny.train("no-room", *case.overrides, "train.max_skipped_steps=1", ranks=2)
    assert "found no room: raise parallel.expert_capacity_factor" in str(caught.value)
    (lacking,) = column(tiny.folder / "runs" / "no-room", "expert_overflow")
    assert lacking > 0


def test_empty_room_is_in_the_bytes_of_the_plan(tiny):
    case = Case(ep=2, dp=2, precision="fp32", room=4)
    run(tiny, case)
    model = CostModel(tiny.config(*case.overrides)).chunk(range(4))
    sent = column(tiny.folder / "runs" / str(case), "expert_bytes")
    assert sent == pytest.approx(
        [SAMPLES * (model.forward_exchange + model.backward_exchange)] * STEPS
    )


@pytest.mark.parametrize("recompute", ["full", pytest.param("none", marks=pytest.mark.nightly)])
def test_bytes_are_those_of_the_plan(tiny, recompute):
    case = Case(ep=2, dp=2, precision="fp32", recompute=recompute)
    run(tiny, case)
    model = CostModel(tiny.config(*case.overrides)).chunk(range(4))
    # Of the step's micro-batches.
    expected = SAMPLES * (model.forward_exchange + model.backward_exchange)
    sent = column(tiny.folder / "runs" / str(case), "expert_bytes")
    # The plan's choices are independent of each other, a router's are not.
    assert sent == pytest.approx([expected] * STEPS, rel=0.15)
