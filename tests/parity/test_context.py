"""Training with shared samples equals one process: losses, norms, gradients and what is learnt."""

from __future__ import annotations

import pytest
import torch

from tests.parity.context_faults import CONTEXT_FAULTS
from tests.parity.expert_runs import Case, run, run_in_turns
from tests.parity.test_experts import check
from tests.tiny import column

CASES = [
    Case(cp=3, length=24, packed=True, recompute="selective"),
    pytest.param(
        Case(cp=2, pp=2, vpp=2, packed=True, residual="standard", recompute="full"),
        marks=pytest.mark.nightly,
    ),
    Case(tp=2, cp=2, ep=2, packed=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_everything_equals_one_process(short, case):
    alone = run(short, case.alone)
    assert min(alone.norms) > 0.5, "clipping takes part"
    check(run(short, case), alone, 1e-9)


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
