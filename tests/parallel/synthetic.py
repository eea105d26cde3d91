"""Parameters that tensor ranks share, in any grid, and the same in one process.

Matrices to be cut by rows and by columns, of equal and of other shapes, in numbers that two ranks
cannot share evenly; a map to heads; a table; replicated ones; a stack of experts.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from attnres_train.config.schema import OptimizerConfig, ParallelConfig
from attnres_train.model.parameters import ParameterRule, constant
from attnres_train.model.parts import Place, indices, named, one_of, whole
from attnres_train.optim.build import build_optimizer, made_whole
from attnres_train.optim.clipping import grad_square_sum
from attnres_train.optim.kinds import optimizer_kind
from attnres_train.parallel.gathering import ParameterGather
from attnres_train.parallel.gradients import sum_over
from attnres_train.parallel.matrices import MatrixDeal, matrix_exchange
from attnres_train.parallel.megatron import Groups, build_groups, lay_out
from attnres_train.parallel.owned import OwnedOptimizer
from attnres_train.parallel.pieces import Held, make_pieces
from attnres_train.parallel.reduction import GradientReduction
from attnres_train.planning.updates import update_of

HEADS = 4
STEPS, SAMPLES = 3, 4
SHAPES = {
    **{f"column_{i}": (8, 12) for i in range(3)},
    **{f"row_{i}": (8, 12) for i in range(2)},
    "wide": (4, 20),
    "heads": (HEADS * 4, 6),
    "table": (40, 6),
    "norm": (6,),
    "router": (6, 5),
    "experts": (4, 3, 6),
}
MATRICES = {name for name in SHAPES if name not in ("table", "norm")}
SPLIT = {"row": 1, "column": 0, "wide": 1, "heads": 0, "table": 0}


def rules(tensor_ranks: int) -> dict[str, ParameterRule]:
    return {
        name: ParameterRule(
            constant(0.0),
            is_matrix=name in MATRICES,
            is_expert=name == "experts",
            split=SPLIT.get(name.partition("_")[0]),
            heads=HEADS // tensor_ranks if name == "heads" else 0,
        )
        for name in SHAPES
    }


def drawn(seed: int, sample: int = 0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(1000 * seed + sample)
    return {n: torch.randn(s, generator=rng, dtype=torch.float64) for n, s in SHAPES.items()}


class Shared(nn.Module):
    """This rank's parameters, and their update. Gradients are given, not computed."""

    def __init__(self, grid: Groups, config: OptimizerConfig) -> None:
        super().__init__()
        self.grid, tensor = grid, grid.tensor
        self.rules = rules(tensor.size())
        self.places = {name: self._place(name) for name in SHAPES}
        for name, value in drawn(0).items():
            self.register_parameter(name, nn.Parameter(self.part(name, value)))
        held = [Held(0, name, p, self.holders(name)) for name, p in self.named_parameters()]
        kind = optimizer_kind(config)
        costs = {
            name: update_of(kind, name, tuple(p.shape), self.rules[name], False, tensor.size())
            for name, p in self.named_parameters()
        }
        pieces = make_pieces(held, costs, config.sharded)
        mine = [(piece.name, piece.tensor) for piece in pieces if piece.is_mine]
        exchange = matrix_exchange(made_whole(mine, self.rules, config), tensor)
        self.inner = build_optimizer(mine, self.rules, config, "cpu", exchange)
        gather = ParameterGather({0: self}, pieces, lambda piece: self)
        reduction = GradientReduction(pieces, grid.data.size())
        self.update = OwnedOptimizer(self.inner, reduction, gather)

    def _place(self, name: str) -> Place:
        rule, shape = self.rules[name], list(SHAPES[name])
        axis = 0 if rule.is_expert else rule.split
        group = self.grid.experts if rule.is_expert else self.grid.tensor
        if axis is None:
            return whole(shape)
        shape[axis] //= group.size()
        return one_of(shape, axis, group.rank(), group.size())

    def holders(self, name: str) -> dist.ProcessGroup:
        """As `Ranks.replicas`."""
        rule, grid = self.rules[name], self.grid
        if rule.is_expert:
            return grid.expert_data
        return grid.stage if rule.split is None else grid.shards

    def part(self, name: str, tensor: Tensor) -> Tensor:
        return tensor[indices(self.places[name], whole(SHAPES[name]))].clone()

    def step(self, step: int) -> float:
        """One update by the mean over samples, of which each data-parallel rank has as many;
        returns the gradient norm."""
        data = self.grid.data
        each = SAMPLES // data.size()
        samples = range(SAMPLES)[data.rank() * each :][:each]
        for name, parameter in self.named_parameters():
            seen = range(SAMPLES) if self.rules[name].is_expert else samples
            mean = sum(drawn(step, sample)[name] for sample in seen) / len(seen)
            # What several tensor ranks, or others, hold alike each has a part of.
            share = data.size() / self.holders(name).size()
            parameter.grad = self.part(name, mean) * (1 if self._is_split(name) else share)
        self.update.reduction.finish()
        norm = sum_over(grad_square_sum(self.update.counted)).sqrt().item()
        self.update.step(0.01 * step)
        self.update.wait()
        self.update.zero_grad()
        return norm

    def _is_split(self, name: str) -> bool:
        return self.rules[name].split is not None


class Outcome(NamedTuple):
    """Of one rank."""

    norms: list[float]
    parameters: list[tuple[str, Tensor]]
    """Parts named as such."""
    state_bytes: int
    dealt: list[list[int]]
    """Whole matrices that each tensor rank was dealt, by batch."""


def trained(tensor: int, experts: int, options: dict[str, Any]) -> Outcome:
    """Runs on every rank: some steps."""
    parallel = ParallelConfig(tensor_model_parallel_size=tensor, expert_model_parallel_size=experts)
    grid = build_groups(lay_out(parallel, dist.get_world_size()), timedelta(seconds=60))
    dealt: list[list[int]] = []
    deal = MatrixDeal._deal

    def told(self: MatrixDeal, matrices: int, cost: int) -> list[int]:
        dealt.append(deal(self, matrices, cost))
        return dealt[-1]

    with mock.patch.object(MatrixDeal, "_deal", told):
        shared = Shared(grid, OptimizerConfig(ns_dtype="fp64", lr=0.01, **options))
        norms = [shared.step(step) for step in range(1, STEPS + 1)]
    parameters = [(named(n, shared.places[n]), p.detach()) for n, p in shared.named_parameters()]
    nbytes = sum(tensor.nbytes for *_, tensor in shared.inner.state_tensors())
    return Outcome(norms, parameters, nbytes, dealt)
