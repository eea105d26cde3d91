"""Whole training steps in fp64 on a grid of ranks, from the trainer to the parameters after it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from attnres_train.config import load_config
from attnres_train.config.schema import RunConfig
from attnres_train.data.prepare import prepare
from attnres_train.model.init import init_weights
from attnres_train.model.naming import released_tensors
from attnres_train.parallel.meeting import meet
from attnres_train.parallel.ranks import Ranks, join_run, places_of
from attnres_train.supervise.watch import Pulse
from attnres_train.training import building
from attnres_train.training.trainer import Trainer
from tests.parts import made_whole
from tests.tiny import torchrun_environment

STEPS = 3
Tensors = dict[str, Tensor]
Fault = Callable[[pytest.MonkeyPatch], None]


@dataclass
class Steps:
    """What a rank has seen of the steps; tensors under released names."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    p2p_bytes: list[int] = field(default_factory=list)
    """Over all ranks."""
    gradients: list[Tensors] = field(default_factory=list)
    """Of each step, before clipping: those that are counted on this rank."""
    parameters: Tensors = field(default_factory=dict)
    """All that the rank holds, after the last step."""
    states: Tensors = field(default_factory=dict)
    """What the rank keeps of the optimizer."""


@contextmanager
def joined_in_fp64(config: RunConfig, port: int) -> Iterator[tuple[Ranks, pytest.MonkeyPatch]]:
    """This process as a rank of ``config``, with fp32 standing for fp64 and no weight that is 0."""
    with (
        torchrun_environment(port),
        meet(300) as meeting,
        join_run(config, meeting) as ranks,
        pytest.MonkeyPatch.context() as patch,
    ):
        for dtypes in (building.PARAMETER_DTYPE, building.STREAM_DTYPE):
            patch.setitem(dtypes, "fp32", torch.float64)
        patch.setattr(building, "init_weights", _init_without_zeros)
        yield ranks, patch


def run_steps(
    path: str, overrides: Sequence[str], port: int, steps: int = STEPS, fault: Fault | None = None
) -> Steps:
    """Runs on every rank: ``steps`` steps of the configuration, with ``train.precision`` fp32
    standing for fp64, and with a ``fault`` if one is given."""
    config, seen = load_config(path, overrides), Steps()
    with joined_in_fp64(config, port) as (ranks, patch):
        if fault is not None:
            fault(patch)
        parts = building.build_parts(config, ranks, prepare(config, progress=False), Pulse())
        trainer, update = Trainer(config, ranks, parts), parts.optimizer
        released = partial(
            released_tensors,
            first_expert=next(iter(parts.chunks.values())).ports.exchange.experts.start,
            places={n: at for c in parts.chunks.values() for n, at in places_of(c, ranks)},
        )
        reduced = update.reduction.finish

        def finish() -> None:
            reduced()
            counted = [p for p in update.reduction.pieces if p.counts_here]
            named = [(p.name, p.tensor.grad.clone()) for p in counted]
            seen.gradients.append(dict(released(named)))

        patch.setattr(update.reduction, "finish", finish)
        for _ in range(steps):
            record, _ = trainer.train_step()
            seen.losses.append(record["loss"])
            seen.grad_norms.append(record["grad_norm"])
            seen.p2p_bytes.append(record["p2p_bytes"])
        update.wait()
        named = [(n, p.detach()) for c in trainer.chunks for n, p in c.named_parameters()]
        seen.parameters = {n: p.clone() for n, p in released(named)}
        for name, key, tensor in update.optimizer.state_tensors():
            views = released([(name, tensor)])
            seen.states |= {f"{key}.{released_name}": view.clone() for released_name, view in views}
        dist.barrier()
    return seen


@torch.no_grad()
def _init_without_zeros(chunk: nn.Module, seed: int) -> None:
    """Pseudo-queries begin at zero, which would hide faults."""
    init_weights(chunk, seed)
    for name, parameter in chunk.named_parameters():
        if "_res_" in name and not name.endswith("_norm.weight"):
            generator = torch.Generator().manual_seed(int.from_bytes(name.encode()) % 2**31)
            parameter.add_(torch.randn(parameter.shape, generator=generator))


def differences(found: list[Steps], expected: Steps, relative: float) -> list[str]:
    """Where the ``found`` of all ranks are not, together, the ``expected`` of one process."""
    told = []
    for rank, steps in enumerate(found):
        for what in ("losses", "grad_norms"):
            if getattr(steps, what) != pytest.approx(getattr(expected, what), rel=relative):
                told.append(f"{what} of rank {rank}")
    for step, gradients in enumerate(expected.gradients):
        merged = once(steps.gradients[step] for steps in found)
        told += [f"gradient of {name}" for name in _apart(merged, gradients, relative)]
    held: Tensors = {}
    for steps in found:
        for name, tensor in steps.parameters.items():
            if not torch.equal(tensor, held.setdefault(name, tensor)):
                told.append(f"replicas of {name}")
    merged = made_whole(held.items())
    return told + [f"parameter {name}" for name in _apart(merged, expected.parameters, relative)]


def once(by_rank: Iterable[Tensors]) -> Tensors:
    """Those of all ranks, each element of which one rank alone may have; whole."""
    return made_whole(item for tensors in by_rank for item in tensors.items())


def _apart(found: Tensors, expected: Tensors, relative: float) -> list[str]:
    assert found.keys() == expected.keys()
    return [
        name
        for name, tensor in expected.items()
        if found[name].shape != tensor.shape
        or (found[name] - tensor).abs().max() > relative * max(tensor.abs().max(), 1e-12)
    ]
