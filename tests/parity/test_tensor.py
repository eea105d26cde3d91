"""Steps whose heads, widths, vocabulary and stream are split equal those of one process."""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from attnres_train.parallel import tensor
from attnres_train.parallel.reduction import GradientReduction
from attnres_train.pipeline.run.stage import Stage
from tests.parity.pool import RankFailedError
from tests.parity.steps import STEPS, Fault, Steps, differences, run_steps
from tests.tiny import free_port, grid

RELATIVE = 1e-9
COMMON = [
    "optimizer.kind=adamw",
    "model.initializer_range=0.1",
    "model.moe.bias_update_rate=0.05",
    "train.seq_length=16",
    "train.micro_batch_size=2",
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
"""Grid, residual, samples (of one document, or packed), recomputation."""
CASES: list[Case] = [
    ("TP2", "block", "packed", "none"),
    ("TP2", "standard", "whole", "full"),
    ("TP2-EP2", "block", "whole", "selective"),
    ("TP2-PP2", "block", "packed", "full"),
    ("TP2-DP2-EP4", "block", "packed", "none"),
    ("TP2-DP2", "standard", "packed", "selective"),
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
            *overrides,
        ]
        return pool.run(run_steps, on.ranks, str(tiny.path), arguments, free_port(), STEPS, fault)

    return steps


def compare(run, case: Case) -> None:
    place, residual, samples, recompute = case
    (expected,) = run("one", residual, samples)
    found = run(place, residual, samples, f"train.recompute={recompute}")
    assert differences(found, expected, RELATIVE) == []
    assert min(expected.grad_norms) > 0.5, "clipping takes part"
    assert any(steps.axes for steps in found)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_three_steps_equal_those_of_one_process(run, case):
    compare(run, case)


@pytest.mark.nightly
@pytest.mark.parametrize("case", OTHERS, ids="-".join)
def test_every_grid_equals_one_process(run, case):
    compare(run, case)
