"""Training with shared samples equals one process: losses, norms, gradients and what is learnt."""

from __future__ import annotations

import pytest
import torch

from tests.parity.context_faults import CONTEXT_FAULTS
from tests.parity.expert_runs import Case, distance, run, run_in_turns
from tests.parity.test_experts import check
from tests.tiny import column

CASES = [
    Case(cp=3, length=24, packed=True, recompute="selective"),
    Case(cp=2, pp=2, vpp=2, packed=True, residual="standard", recompute="full"),
    Case(tp=2, cp=2, ep=2, packed=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_everything_equals_one_process(short, case):
    alone = run(short, case.alone)
    assert min(alone.norms) > 0.5, "clipping takes part"
    check(run(short, case), alone, 1e-9)


@pytest.mark.nightly
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 0.4)])
def test_lower_precisions_are_no_further_from_fp64_than_in_one_process(short, precision, tolerance):
    """In bf16 what a state adds to the outputs is rounded by itself, and the sum once more, 2^-9
    each: that is little beside what all other sublayers round. As in `test_experts`, the tolerance
    is that of the first step; one process is 0.31 from fp64 on these few and short documents."""
    exact = run(short, Case(packed=True))
    errors = []
    for case in (
        Case(cp=2, packed=True, precision=precision),
        Case(precision=precision, packed=True),
    ):
        found = run(short, case)
        assert found.losses[0] == pytest.approx(exact.losses[0], rel=tolerance / 10)
        assert found.norms[0] == pytest.approx(exact.norms[0], rel=tolerance)
        errors.append(distance(found.gradients[0], exact.gradients[0]))
    assert errors[0] < min(tolerance, 1.2 * errors[1])


def test_validation_and_what_is_logged(short):
    overrides = ("train.seq_length=24", "data.reset_at_documents=true", "train.stop_after=3")
    alone = short.train("alone", *overrides)
    found = short.train("CP2", *overrides, "parallel.context_parallel_size=2", ranks=2)
    for key in ("loss", "validation_loss", "grad_norm", "tokens", "expert_entropy"):
        assert column(found, key) == pytest.approx(column(alone, key), rel=1e-4), key
    screen = short.screen("CP2", *overrides, "parallel.context_parallel_size=2", ranks=2)
    assert "24 tokens / 4 shares x 2 = 12 per rank" in screen


@pytest.mark.parametrize(
    "fault",
    [pytest.param(n, marks=[pytest.mark.nightly] * (i > 0)) for i, n in enumerate(CONTEXT_FAULTS)],
)
def test_faults_are_found(short, fault):
    case = Case(cp=2, packed=True)
    with pytest.raises(AssertionError):
        check(run(short, case, fault), run(short, case.alone), 1e-9)


def test_any_grid_goes_on_from_any_other(short):
    """State of the optimizer included: the steps after the first ones would differ else."""
    grids = [Case(cp=2, length=24), Case(tp=2, dp=2, length=24), Case(cp=3, length=24)]
    check(run_in_turns(short, "in-turns", grids), run(short, Case(length=24)), 1e-9)


@pytest.mark.nightly
def test_a_resumed_run_repeats_every_bit(short):
    case = Case(cp=2)
    resumed = run_in_turns(short, "resumed", [case, case])
    whole = run(short, case)
    assert resumed.losses == whole.losses
    assert all(torch.equal(resumed.saved[name], value) for name, value in whole.saved.items())
