"""Chunks for the pipeline benchmarks: compute that is a sleep, as of a busy accelerator.

Shapes: B samples, T tokens, D hidden_size.
"""

from __future__ import annotations

import ctypes
import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attnres_train.pipeline.plan import TransportPlan

PR_SET_TIMERSLACK, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = 29, -3, -1


def sleep_precisely() -> None:
    """Let this process wake up on time: without the 50 us that Linux may add to a sleep, and ahead
    of other processes on a busy machine (which hardly notice: it sleeps nearly all of its time)."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)
    for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
        libc.mallopt(parameter, 1 << 30)
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))


def sleep_until(deadline: float) -> None:
    time.sleep(max(0.0, deadline - time.monotonic()))


@dataclass
class Batch:
    tokens: Tensor


@dataclass
class Output:
    blocks: dict[int, Tensor] = field(default_factory=dict)
    partial: Tensor | None = None
    loss: Tensor | None = None


class SleepingChunk(nn.Module):
    """A chunk of ``plan`` whose forward pass takes ``seconds`` and whose backward pass twice that.

    Tensors are zero and have the right shape; making them and collecting gradients is part of the
    time. Chunks without memory in flight between them: one chunk runs at a time on a rank.
    """

    def __init__(self, plan: TransportPlan, chunk: int, seconds: float, hidden_size: int) -> None:
        super().__init__()
        self.seconds, self.hidden_size = seconds, hidden_size
        self.produced = plan.produced(chunk)
        hop = plan.hop_out_of(chunk)
        self.is_last = hop is None
        self.has_partial = hop is not None and hop.partial
        self.gate = nn.Parameter(torch.zeros(1))
        self.backward_deadline = 0.0

    def forward(self, batch: Any, blocks: dict[int, Tensor], partial: Tensor | None) -> Output:
        deadline = time.monotonic() + self.seconds
        shape = *batch.tokens.shape, self.hidden_size
        sources = [*blocks.values(), *([] if partial is None else [partial])]
        made = len(self.produced) + self.has_partial
        end = _BackwardEnd.apply(self.gate, self)
        *tensors, loss = _Compute.apply(end, self, shape, made, *sources)
        sleep_until(deadline)
        return Output(
            blocks=dict(zip(self.produced, tensors, strict=False)),
            partial=tensors[-1] if self.has_partial else None,
            loss=loss.sum() if self.is_last else None,
        )


class _Compute(torch.autograd.Function):
    """Zeros of ``shape`` that depend on every source, and a loss [1]."""

    @staticmethod
    def forward(ctx, end, chunk, shape, made, *sources):
        ctx.chunk, ctx.shape, ctx.num_sources = chunk, shape, len(sources)
        return *(torch.zeros(shape) for _ in range(made)), torch.zeros(1)

    @staticmethod
    def backward(ctx, *_):
        ctx.chunk.backward_deadline = time.monotonic() + 2 * ctx.chunk.seconds
        gradients = (torch.zeros(ctx.shape) for _ in range(ctx.num_sources))
        return torch.zeros(1), None, None, None, *gradients


class _BackwardEnd(torch.autograd.Function):
    """Applied first, so its backward runs last: when every gradient has been accumulated."""

    @staticmethod
    def forward(ctx, gate, chunk):
        ctx.chunk = chunk
        return gate.clone()

    @staticmethod
    def backward(ctx, gradient):
        sleep_until(ctx.chunk.backward_deadline)
        return gradient, None
