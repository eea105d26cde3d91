"""Pipelined runs of a small but complete model in fp64, and the same runs in plain autograd.

A run is: a training step, a validation, and a second training step with another sequence length and
another number of micro-batches, whose gradients add to the first one's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from attnres_train.config.model_schema import (
    KDAConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    ResidualConfig,
)
from attnres_train.model.batch import MicroBatch
from attnres_train.model.chunk import ModelChunk
from attnres_train.model.init import init_weights
from attnres_train.pipeline.plan.layout import make_layout
from attnres_train.pipeline.plan.messages import channels
from attnres_train.pipeline.plan.schedule import forward_only, one_f_one_b
from attnres_train.pipeline.plan.transport_plan import TransportPlan
from attnres_train.pipeline.run.engine import Engine
from attnres_train.pipeline.run.transport import P2PTransport, Transport

TIMEOUT = timedelta(seconds=300)


@dataclass(frozen=True)
class Case:
    """A model and the way it is spread; ``block_size`` None is the standard residual, 1 the full
    one. ``micro_batches`` are those of the first step; the second has two fewer (1 at least)."""

    block_size: int | None
    ranks: int
    virtual: int
    micro_batches: int
    num_layers: int = 8
    layout: tuple[int, ...] | None = None
    recompute: str = "none"
    debug: bool = False
    residual: tuple[tuple[str, Any], ...] = ()
    """Other keys and values of the residual; where ``kind`` is one, ``block_size`` is not used."""
    packed: bool = False
    """Whether samples hold several documents."""

    def __str__(self) -> str:
        residual = {None: "standard", 1: "full"}.get(self.block_size, f"S{self.block_size}")
        residual += "".join(f"-{key}-{value}" for key, value in self.residual)
        layout = "" if self.layout is None else "-uneven"
        extras = f"-{self.recompute}" * (self.recompute != "none") + "-debug" * self.debug
        extras += "-packed" * self.packed
        shape = f"P{self.ranks}V{self.virtual}M{self.micro_batches}L{self.num_layers}"
        return f"{residual}-{shape}{layout}{extras}"

    @property
    def unspread(self) -> Case:
        """The same model and micro-batches on one rank, in one chunk."""
        return replace(self, ranks=1, virtual=1, layout=None, recompute="none", debug=False)

    @property
    def plan(self) -> TransportPlan:
        split = "even" if self.layout is None else self.layout
        layout = make_layout(
            self.num_layers,
            self.config.block_size,
            self.ranks,
            self.virtual,
            split,
            partial_units=self.config.residual_kind.partial_units,
        )
        return TransportPlan(layout)

    @property
    def config(self) -> ModelConfig:
        kind = {None: "standard", 1: "full"}.get(self.block_size, "block")
        residual = {"kind": kind, "block_size": self.block_size or 1, **dict(self.residual)}
        return ModelConfig(
            hidden_size=16,
            num_layers=self.num_layers,
            vocab_size=32,
            intermediate_size=24,
            residual=ResidualConfig(**residual),
            kda=KDAConfig(num_heads=2, head_dim=8, chunk_size=4),
            mla=MLAConfig(
                num_heads=2, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8
            ),
            moe=MoEConfig(num_experts=4, num_experts_per_token=2, intermediate_size=12),
        )


@dataclass
class RunResult:
    """``losses`` of first step, validation, second step (None where the rank has none)."""

    losses: list[float | None]
    gradients: dict[str, Tensor]
    bytes_sent: int
    peak_blocks: list[int]
    peak_bytes: list[int]
    planned_peak_blocks: list[int]


def batches(count: int, length: int, seed: int, packed: bool) -> list[MicroBatch]:
    """Micro-batches of two samples; ``packed`` ones hold documents of 1, 3 and more tokens."""
    generator = torch.Generator().manual_seed(seed)
    borders = torch.tensor([0, 1, 4, length, 2 * length - 2, 2 * length], dtype=torch.int32)
    return [
        MicroBatch(
            tokens=torch.randint(32, (2, length), generator=generator),
            labels=torch.randint(32, (2, length), generator=generator),
            loss_mask=(torch.rand(2, length, generator=generator) < 0.8).double(),
            cu_seqlens=borders if packed else None,
        )
        for _ in range(count)
    ]


def inputs(case: Case) -> tuple[list[MicroBatch], list[MicroBatch], list[MicroBatch]]:
    """Micro-batches of the first step, the validation and the second step."""
    return (
        batches(case.micro_batches, length=7, seed=1, packed=case.packed),
        batches(3, length=5, seed=2, packed=case.packed),
        batches(max(1, case.micro_batches - 2), length=5, seed=3, packed=case.packed),
    )


@torch.no_grad()
def make_chunk(case: Case, first_layer: int, last_layer: int) -> ModelChunk:
    """A chunk with weights of a useful size; pseudo-queries start at zero and would hide faults."""
    chunk = ModelChunk(
        case.config, first_layer, last_layer, recompute=case.recompute, dtype=torch.float64
    )
    init_weights(chunk, seed=5)
    for name, parameter in chunk.named_parameters():
        if "_res_" in name and not name.endswith("_norm.weight"):
            seed = int.from_bytes(name.encode(), "little") % 2**31
            generator = torch.Generator().manual_seed(seed)
            parameter.add_(torch.randn(parameter.shape, generator=generator))
        elif parameter.dim() > 1:
            parameter.mul_(4)
    return chunk


def gradients(chunks: Iterable[nn.Module]) -> dict[str, Tensor]:
    """By parameter name. A parameter that nothing depends on has none and gets zeros."""
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for chunk in chunks
        for name, parameter in chunk.named_parameters()
    }


@cache
def run_plain(case: Case) -> RunResult:
    """An unspread case: one chunk, micro-batch after micro-batch, by plain autograd."""
    chunk, losses = make_chunk(case, 0, case.num_layers), []
    first, validation, second = inputs(case)
    for step in (first, second):
        parts = [chunk(batch, {}, None).loss / len(step) for batch in step]
        for part in parts:
            part.backward()
        losses.append(sum(part.item() for part in parts))
    with torch.no_grad():
        losses.insert(1, sum(chunk(b, {}, None).loss.item() for b in validation) / len(validation))
    return RunResult(losses, gradients([chunk]), 0, [], [], [])


def run_rank(case: Case, rank: int, transport: Transport) -> RunResult:
    """One rank's part of the pipelined run."""
    plan, sent_before = case.plan, transport.bytes_sent
    layout = plan.layout
    chunks = {
        index: make_chunk(case, layout.bounds[index], layout.bounds[index + 1])
        for index in layout.chunks_of(rank)
    }
    engine = Engine(
        chunks, plan, rank, transport, case.config.stream_size, torch.float64, debug=case.debug
    )
    first, validation, second = inputs(case)
    results = [engine.train_step(first), engine.evaluate(validation), engine.train_step(second)]
    schedules = (one_f_one_b, forward_only, one_f_one_b)
    programs = [
        engine.program(schedule, len(step))
        for schedule, step in zip(schedules, (first, validation, second), strict=True)
    ]
    return RunResult(
        losses=[None if r.loss is None else r.loss.item() for r in results],
        gradients=gradients(chunks.values()),
        bytes_sent=transport.bytes_sent - sent_before,
        peak_blocks=[result.peak_blocks for result in results],
        peak_bytes=[result.peak_bytes for result in results],
        planned_peak_blocks=[program.report.peak_blocks[rank] for program in programs],
    )


def run_cases(cases: Sequence[Case]) -> list[RunResult]:
    """This worker's part of every case, over gloo."""
    used = sorted({channel for case in cases for channel in channels(case.plan)})
    transport = P2PTransport(used, [range(cases[0].ranks)], TIMEOUT)
    return [run_rank(case, dist.get_rank(), transport) for case in cases]
