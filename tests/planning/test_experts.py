"""Bytes of the experts' exchange by enumeration of all choices, and what a rank holds."""

from __future__ import annotations

import json
from itertools import combinations
from statistics import fmean

import pytest

from attnres_train.config import load_config
from attnres_train.planning.costs import CostModel
from attnres_train.planning.experts import exchange_bytes
from tests.planning.test_planner import plan

EP = "parallel.expert_model_parallel_size={}"


def config(ranks: int, *overrides: str):
    moe = ("model.moe.num_experts=8", "model.moe.num_experts_per_token=3")
    return load_config("configs/quickstart.yaml", [*moe, EP.format(ranks), *overrides])


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_a_token_goes_once_to_every_other_rank_of_its_experts(ranks):
    share = 8 // ranks
    choices = list(combinations(range(8), 3))  # of a token at home on rank 0
    elsewhere = [[e // share for e in chosen if e // share] for chosen in choices]
    found = exchange_bytes(config(ranks), 2)
    copies, pairs = fmean(len(set(of)) for of in elsewhere), fmean(map(len, elsewhere))
    assert found.ranks_per_token == pytest.approx(copies)
    tokens, row = 2 * 256, 128 * 2  # of a micro-batch; bytes of a token
    # There and back; which expert and its weight; in the backward pass the weight's gradient.
    assert found.forward == pytest.approx(tokens * (2 * copies * row + 8 * pairs))
    assert found.backward == pytest.approx(tokens * (2 * copies * row + 4 * pairs))
    assert found.per_pair == pytest.approx(tokens * pairs * (4 * row + 12))
    again = exchange_bytes(config(ranks, "train.recompute=full"), 2)
    assert again.forward == found.forward
    assert again.backward - found.backward == pytest.approx(tokens * (copies * row + 8 * pairs))


def test_a_rank_holds_its_share_of_the_experts_and_all_of_the_rest():
    whole, half, quarter = (CostModel(config(ranks)).chunk(range(8)) for ranks in (1, 2, 4))
    layers, width = 7, 3 * 128 * load_config("configs/quickstart.yaml").model.moe.intermediate_size
    assert whole.parameters - half.parameters == layers * 4 * width
    assert half.parameters - quarter.parameters == layers * 2 * width
    assert whole.optimizer_bytes - half.optimizer_bytes == 4 * layers * 4 * width  # Muon's momentum
    assert whole.forward_flops == half.forward_flops
    assert whole.forward_exchange == whole.backward_exchange == 0 < half.forward_exchange


def test_the_plan_tells_the_exchange(capsys):
    grid = ("model.moe.num_experts=8", EP.format(4))
    text = plan(capsys, "quickstart", overrides=grid)
    assert "Experts (2 per rank and layer, 4 ranks; a token goes to" in text
    report = json.loads(plan(capsys, "quickstart", "--json", overrides=grid))
    one = report["experts"]
    layers = [sum(last - max(first, 1) + 1 for first, last in r["layers"]) for r in report["ranks"]]
    assert [rank["exchange_bytes"] for rank in report["ranks"]] == pytest.approx(
        [n * (one["forward"] + one["backward"]) for n in layers]
    )
    assert "Experts (" not in plan(capsys, "quickstart")


def test_the_simulated_step_waits_for_the_exchange(capsys):
    steps = [
        json.loads(plan(capsys, "quickstart", "--json", "--nproc", "4", overrides=grid))["steps"]
        for grid in ((), (EP.format(2),))
    ]
    assert steps[1]["standard"]["seconds"] > steps[0]["standard"]["seconds"]
