"""Every gradient of a pipelined step equals plain autograd, and the wire carries the bound."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
import torch

from attnres_train.pipeline.plan.transport_plan import lower_bound
from tests.parity.cases import Case, RunResult, inputs, run_cases, run_plain, run_rank
from tests.pipeline.run.threads import first_of, run_ranks

GRID = [(2, 1), (2, 2), (4, 1), (4, 2)]
CASES = [
    *(Case(size, p, v, 4) for size in (None, 1, 4, 3) for p, v in GRID),
    Case(4, 1, 1, 3),
    Case(3, 1, 3, 3),
    Case(5, 2, 2, 5, layout=(1, 3, 2, 2)),
    Case(5, 2, 2, 5, layout=(1, 3, 2, 2), recompute="selective"),
    Case(None, 2, 2, 3, recompute="selective"),
    Case(None, 2, 2, 3, layout=(3, 1, 1, 3), recompute="full"),
    Case(16, 4, 2, 6, recompute="full"),
    Case(3, 4, 2, 4, recompute="full"),
    Case(3, 4, 2, 4, recompute="selective"),
    Case(1, 4, 1, 5, recompute="selective"),
    Case(1, 4, 2, 7, recompute="full"),
    Case(7, 4, 1, 1, layout=(3, 1, 3, 1), debug=True),
    Case(2, 4, 2, 2, debug=True),
    Case(3, 3, 3, 7, num_layers=9, debug=True),
    Case(4, 3, 3, 2, num_layers=11, layout=(1, 2, 1, 1, 1, 2, 1, 1, 1)),
    Case(3, 8, 1, 9, debug=True),
    Case(3, 8, 2, 10, num_layers=16),
    Case(1, 8, 1, 3, recompute="full"),
    Case(None, 2, 2, 4, packed=True),
    Case(3, 2, 2, 5, packed=True),
    Case(4, 2, 2, 4, recompute="full", packed=True),
    Case(1, 2, 2, 4, residual=(("window", 2),)),
    Case(3, 2, 2, 3, residual=(("query", "input"), ("num_heads", 2)), recompute="full"),
    Case(1, 2, 1, 3, residual=(("scores", "bias"), ("normalizer", "sigmoid"))),
    Case(3, 2, 2, 3, residual=(("block_sum", "unit_outputs"), ("values", "key"))),
    Case(None, 4, 2, 5, residual=(("kind", "dense_former"),), debug=True),
    Case(None, 2, 2, 3, residual=(("kind", "mhc_lite"),), layout=(1, 3, 3, 1)),
]
IDS = [str(case) for case in CASES]


@pytest.fixture(scope="module")
def over_gloo(pool):
    """A case's results by rank; all cases of a number of ranks run in one go."""

    @cache
    def run_all(ranks: int) -> dict[Case, list[RunResult]]:
        cases = [case for case in CASES if case.ranks == ranks]
        by_rank = pool.run(run_cases, ranks, cases, timeout=900)
        return dict(zip(cases, zip(*by_rank, strict=True), strict=True))

    return lambda case: run_all(case.ranks)[case]


def merged_gradients(results: list[RunResult]) -> dict[str, torch.Tensor]:
    return {name: grad for result in results for name, grad in result.gradients.items()}


def norm(gradients: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(gradient.square().sum().item() for gradient in gradients.values()))


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_losses_and_every_gradient_equal_plain_autograd(case, over_gloo):
    plain, results = run_plain(case.unspread), over_gloo(case)
    losses = [first_of(step) for step in zip(*(r.losses for r in results), strict=True)]
    assert losses == pytest.approx(plain.losses, rel=1e-10)

    found = merged_gradients(results)
    assert found.keys() == plain.gradients.keys()
    assert norm(found) == pytest.approx(norm(plain.gradients), rel=1e-10)
    assert norm(found) > 0.1
    for name, expected in plain.gradients.items():
        error = (found[name] - expected).norm() / expected.norm().clamp(min=1e-12)
        assert error < 1e-10, f"{name}: {error:.2e}"


def test_documents_matter():
    """The packed cases would say nothing if their losses were those of whole samples."""
    case = Case(3, 1, 1, 5)
    packed = run_plain(replace(case, packed=True)).losses
    assert all(abs(a - b) > 1e-4 for a, b in zip(packed, run_plain(case).losses, strict=True))


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_the_wire_carries_the_bound_and_the_store_the_planned_peak(case, over_gloo):
    results, plan = over_gloo(case), case.plan
    assert plan.units().exact == lower_bound(plan.layout)
    first, validation, second = inputs(case)
    directions = [*first, *first, *validation, *second, *second]
    sizes = [batch.tokens.numel() * case.config.stream_size * 8 for batch in directions]
    identities = 24 * len(directions) if case.debug else 0
    sent = sum(result.bytes_sent for result in results)
    assert sent == lower_bound(plan.layout) * (sum(sizes) + identities)
    units = [step[0].tokens.numel() * case.config.stream_size * 8 for step in inputs(case)]
    for result in results:
        planned = result.planned_peak_blocks
        assert result.peak_blocks == planned
        assert result.peak_bytes == [n * unit for n, unit in zip(planned, units, strict=True)]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[pytest.mark.nightly] * (case.ranks == 8))
        for case in [case for case in CASES if case.ranks > 1][::3]
    ],
    ids=str,
)
def test_mailboxes_give_the_same_bits_as_gloo(case, over_gloo):
    by_gloo = over_gloo(case)
    by_mail = run_ranks(case.ranks, lambda rank, transport: run_rank(case, rank, transport))
    for gloo, mail in zip(by_gloo, by_mail, strict=True):
        assert gloo.losses == mail.losses
        assert gloo.gradients.keys() == mail.gradients.keys()
        for name, gradient in gloo.gradients.items():
            assert torch.equal(gradient, mail.gradients[name]), name
