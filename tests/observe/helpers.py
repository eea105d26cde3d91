"""Observers in a run of one process that has not begun."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from attnres_train.config.schema import RunConfig
from attnres_train.observe.observer import Observer, RunContext, RunInfo


def context(folder: Path, rank: int = 0, **log: Any) -> RunContext:
    """A run of 20 steps with run folder ``folder`` and section ``log``, without a process group."""
    config = RunConfig.model_validate(
        {
            "model": {"hidden_size": 8, "num_layers": 1, "vocab_size": 8},
            "train": {"train_iters": 20, "seq_length": 8, "global_batch_size": 1},
            "log": log,
        }
    )
    return RunContext(
        config=config,
        folder=folder,
        info=RunInfo(num_parameters=64, num_tokens=1000, unigram_entropy=1.5),
        rank=rank,
        world_size=1,
        pp_rank=rank,
        dp_rank=0,
        device=torch.device("cpu"),
        chunks={rank: torch.nn.Linear(2, 2)},
        counted=frozenset(),
        control=None,
    )


def make(kind: type[Observer], folder: Path, **log: Any) -> Observer:
    """An observer of class ``kind`` that section ``log`` switches on."""
    run = context(folder, **log)
    return kind(run.config.log, "log", run)


def record(step: int, **more) -> dict:
    values = {"tokens": 64 * step, "loss": 8.0 / step, "grad_norm": 1.0, "lr": 1e-3}
    values |= {"tokens_per_second": 640.0, "step_seconds": 0.1, "p2p_bytes": 7, "memory_bytes": 9}
    return {"step": step, **values, **more}


def write(sink, steps, start: int) -> None:
    sink.on_start(start)
    for step in steps:
        sink.on_step_end(record(step))
    sink.on_end()
