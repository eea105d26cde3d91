"""Training runs in fp64 whose experts or samples are shared by ranks, and what is compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from attnres_train.model.chunk import ModelChunk
from attnres_train.model.naming import released_tensors
from attnres_train.model.parameters import parameter_rules
from attnres_train.model.parts import Place, Span, whole
from attnres_train.observe.observer import Observer
from attnres_train.training import building
from tests.parity.context_faults import CONTEXT_FAULTS
from tests.parts import made_whole
from tests.tiny import TinyRuns, column, free_port, saved_tensors, train_rank

STEPS = 3
SAMPLES = 8
"""Of a step: some micro-batches for each of four replicas."""
OVERRIDES = (
    f"train.global_batch_size={SAMPLES}",
    "model.moe.num_experts=8",
    "model.moe.num_experts_per_token=3",
    "model.moe.bias_update_rate=0.05",
    "model.initializer_range=0.1",
    f"train.train_iters={STEPS}",
    "train.eval_interval=0",
    "train.clip_grad=0.5",
    "optimizer.ns_dtype=fp64",
    "checkpoint.save_interval=0",
    "log.plot=false",
)
RESIDUALS = {
    "block": "{kind: block, block_size: 3}",
    "standard": "{kind: standard}",
    "full": "{kind: full, window: 3}",
    "input": "{kind: block, block_size: 3, query: input, num_heads: 2}",
    "bias": "{kind: block, block_size: 2, scores: bias, normalizer: sigmoid}",
    "dense": "{kind: dense_former}",
    "mhc": "{kind: mhc_lite}",
}


class Gradients(Observer):
    """Writes every gradient of every step into the run folder, a file per step and rank."""

    everywhere = True

    def on_backward(self, step: int, chunks: Mapping[int, nn.Module]) -> None:
        found: dict[str, Tensor] = {}
        for chunk in chunks.values():
            named = [(name, p.grad) for name, p in chunk.named_parameters()]
            first, places = chunk.ports.exchange.experts.start, places_in(chunk)
            found |= released_tensors(named, first, places)
        folder = self.run.folder / "gradients"
        folder.mkdir(exist_ok=True)
        torch.save(found, folder / f"{step}-{self.run.rank}.pt")


def places_in(chunk: ModelChunk) -> dict[str, Place]:
    """Where what is here of every split parameter lies in it."""
    split, places = chunk.ports.split, {}
    for name, rule in parameter_rules(chunk).items():
        if rule.split is not None:
            shape = chunk.get_parameter(name).shape
            size = split.whole(shape, rule.split)[rule.split]
            place, here = list(whole(shape)), split.share(size)
            place[rule.split] = Span(here.start, here.stop, size)
            places[name] = tuple(place)
    return places


_OF_THE_MODEL = ("residual", "packed", "precision", "length", "more")


@dataclass(frozen=True)
class Case:
    """A grid and what runs on it; ``dp`` counts replicas. ``ep`` of the ranks of a stage share the
    experts, ``cp`` the tokens of the same samples, ``tp`` heads, widths and the stream."""

    ep: int = 1
    dp: int = 1
    pp: int = 1
    vpp: int = 1
    residual: str = "block"
    packed: bool = False
    recompute: str = "none"
    precision: str = "fp64"
    room: float = 0
    """Of the bounded exchange; 0: the exact one."""
    cp: int = 1
    tp: int = 1
    length: int = 16
    samples: int = 1
    """Of a micro-batch."""
    more: tuple[str, ...] = ()
    """Other overrides."""
    watched: bool = True
    """Whether every rank gets and writes down all gradients; else they go to their owners alone."""

    def __str__(self) -> str:
        grid = f"EP{self.ep}-DP{self.dp}-PP{self.pp}V{self.vpp}"
        grid = f"TP{self.tp}-" * (self.tp > 1) + grid
        grid = f"CP{self.cp}-" * (self.cp > 1) + grid + f"-T{self.length}" * (self.length != 16)
        extras = f"-{self.recompute}" * (self.recompute != "none") + "-packed" * self.packed
        extras += f"-B{self.samples}" * (self.samples > 1)
        extras += "".join(f"-{word.split('.')[-1]}" for word in self.more).replace("=", "-")
        extras += f"-room{self.room}" * (self.room > 0) + "-owners" * (not self.watched)
        return f"{grid}-{self.residual}{extras}" + f"-{self.precision}" * (self.precision != "fp64")

    @property
    def alone(self) -> Case:
        """The same model and data in one process."""
        return replace(Case(), **{name: getattr(self, name) for name in _OF_THE_MODEL})

    @property
    def ranks(self) -> int:
        return self.tp * self.cp * self.dp * self.pp

    @property
    def overrides(self) -> list[str]:
        precision = "fp32" if self.precision == "fp64" else self.precision
        return [
            *OVERRIDES,
            f"train.seq_length={self.length}",
            f"train.micro_batch_size={self.samples}",
            f"parallel.context_parallel_size={self.cp}",
            f"parallel.tensor_model_parallel_size={self.tp}",
            f"parallel.expert_model_parallel_size={self.ep}",
            f"parallel.pipeline_model_parallel_size={self.pp}",
            f"parallel.virtual_pipeline_model_parallel_size={self.vpp}",
            f"model.residual={RESIDUALS[self.residual]}",
            f"data.reset_at_documents={str(self.packed).lower()}",
            f"train.recompute={self.recompute}",
            f"train.precision={precision}",
            *([f"parallel.expert_capacity_factor={self.room}"] * (self.room > 0)),
            f"parallel.expert_dispatcher={'bounded' if self.room else 'exact'}",
            f"log.observers=[{'tests.parity.expert_runs:Gradients' * self.watched}]",
            *self.more,
        ]


@dataclass
class Outcome:
    losses: list[float]
    norms: list[float]
    gradients: list[dict[str, Tensor]]
    """Of each step, by released name; none of a run that nobody watched."""
    balance: list[list[float]]
    saved: dict[str, Tensor]
    """The last checkpoint: parameters, biases of the routers, state of the optimizer."""


def run_rank(case: Case, arguments: list[str], port: int, fault: str | None) -> None:
    """One rank of ``case``, with a fault of `FAULTS` if that is wanted."""
    dtypes = {"fp32": torch.float64} if case.precision == "fp64" else {}
    with (
        mock.patch.dict(building.PARAMETER_DTYPE, dtypes),
        mock.patch.dict(building.STREAM_DTYPE, dtypes),
        (FAULTS | CONTEXT_FAULTS)[fault]() if fault else mock.patch.dict({}),
    ):
        train_rank(arguments, port)


def run(tiny: TinyRuns, case: Case, fault: str | None = None) -> Outcome:
    name = f"{case}-{fault}" if fault else str(case)
    folder = tiny.folder / "runs" / name
    if not folder.exists():
        arguments = [str(tiny.path), f"run.name={name}", *case.overrides]
        tiny.pool.run(run_rank, case.ranks, case, arguments, free_port(), fault)
    return outcome(folder, case.watched)


def run_in_turns(tiny: TinyRuns, name: str, cases: Sequence[Case]) -> Outcome:
    """One run, of which each case but the last does one step."""
    for done, case in enumerate(cases, 1):
        end = done if done < len(cases) else STEPS
        arguments = [str(tiny.path), f"run.name={name}", *case.overrides, f"train.stop_after={end}"]
        tiny.pool.run(run_rank, case.ranks, case, arguments, free_port(), None)
    return outcome(tiny.folder / "runs" / name)


def outcome(folder: Path, watched: bool = True) -> Outcome:
    gradients = []
    for step in range(1, STEPS + 1) if watched else ():
        found: dict[str, Tensor] = {}
        for file in sorted((folder / "gradients").glob(f"{step}-*.pt")):
            mine = torch.load(file)
            # Replicas have the same: whoever differs would be a rank that trains another model.
            assert all(torch.equal(found[name], mine[name]) for name in found.keys() & mine.keys())
            found |= mine
        gradients.append(made_whole(found.items()))
    saved = saved_tensors(folder, STEPS)
    balance = [column(folder, f"expert_{key}") for key in ("entropy", "violation")]
    return Outcome(column(folder, "loss"), column(folder, "grad_norm"), gradients, balance, saved)


def worst(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Largest relative error, of norms, of any tensor."""
    assert found.keys() == expected.keys()
    errors = []
    for name, value in expected.items():
        norm = value.double().norm().clamp(min=1e-12)
        errors.append(((found[name].double() - value.double()).norm() / norm).item())
    return max(errors)


def distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Relative error of all tensors as one vector."""
    assert found.keys() == expected.keys()
    off = sum((found[name].double() - value).square().sum() for name, value in expected.items())
    return math.sqrt(off / sum(value.square().sum() for value in expected.values()))


def _doubled_expert_gradient() -> Any:
    """Summed over the ranks that have the experts, but divided by their number alone."""
    from attnres_train.parallel.pieces import Piece
    from attnres_train.parallel.reduction import GradientReduction

    settle = GradientReduction._settle

    def by_their_number(self: GradientReduction, piece: Piece) -> None:
        with mock.patch.object(self, "_replicas", piece.group.size()):
            settle(self, piece)

    return mock.patch.object(GradientReduction, "_settle", by_their_number)


def _norm_without_experts() -> Any:
    """On all ranks alike: else they drift apart, which saving would tell."""
    from attnres_train.parallel.pieces import Piece

    counts = Piece.counts_here.fget
    dense_alone = property(lambda self: counts(self) and ".experts." not in self.name)
    return mock.patch.object(Piece, "counts_here", dense_alone)


def _forgotten_expert() -> Any:
    """The last expert of every rank computes nothing."""
    from attnres_train.model.moe import layer

    def forward(self: layer.Experts, rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        last = torch.arange(len(rows)) >= ends[-2]
        return original(self, rows, weights.masked_fill(last, 0), ends)

    original = layer.Experts.forward
    return mock.patch.object(layer.Experts, "forward", forward)


FAULTS = {
    "doubled-gradient": _doubled_expert_gradient,
    "norm-without-experts": _norm_without_experts,
    "forgotten-expert": _forgotten_expert,
}
