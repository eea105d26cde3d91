"""Chunks for the pipeline benchmarks: compute that is a sleep, as of a busy accelerator.

Shapes: B samples, T tokens, D hidden_size.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from attnres_train.pipeline.plan.transport_plan import TransportPlan

PR_SET_TIMERSLACK, M_TOP_PAD, M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = 29, -2, -1, -3


def keep_memory() -> None:
    """Let malloc keep what is freed, as the launcher has it in all workers (``MALLOC_ENVIRONMENT``,
    which is read when a process starts; this one has been forked)."""
    libc = ctypes.CDLL(None)
    for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
        libc.mallopt(parameter, 1 << 30)
    libc.mallopt(M_TOP_PAD, 1 << 26)


def sleep_precisely() -> None:
    """Let this process wake up on time: without the 50 us that Linux may add to a sleep, and ahead
    of other processes on a busy machine (which hardly notice: it sleeps most of its time)."""
    ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))


def sleep_until(deadline: float) -> None:
    if (left := deadline - time.monotonic()) > 0:
        time.sleep(left)


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

    Its tensors are zero. Making them and collecting gradients is part of the time; waiting inside
    the backward pass is not. Blocks that the plan has it read itself are complete at their share of
    the time.
    """

    def __init__(self, plan: TransportPlan, chunk: int, seconds: float, hidden_size: int) -> None:
        super().__init__()
        self.seconds, self.hidden_size = seconds, hidden_size
        self.inner = plan.used_inside(chunk)
        self.outer = [block for block in plan.produced(chunk) if block not in self.inner]
        hop = plan.hop_out_of(chunk)
        self.is_last = hop is None
        self.has_partial = hop is not None and hop.partial
        sublayers, ends = plan.layout.sublayers(chunk), plan.layout.blocks.ends
        done = [max(0, ends[b] - sublayers[0] + 1) / len(sublayers) for b in self.inner]
        self.shares = [end - start for start, end in pairwise([0.0, *done, 1.0])]
        self.gate = nn.Parameter(torch.zeros(1))
        self.clock = 0.0

    def forward(
        self,
        batch: Any,
        blocks: dict[int, Tensor],
        partial: Tensor | None,
        on_block: Callable[[int, Tensor], None] = lambda block, tensor: None,
    ) -> Output:
        self.clock = time.monotonic()
        shape = *batch.tokens.shape, self.hidden_size
        sources = [*blocks.values(), *([] if partial is None else [partial])]
        # `link` ties the segments together, so that their backward passes run one after the other.
        link, output = _BackwardEnd.apply(self.gate, self), Output()
        for block, share in zip(self.inner, self.shares, strict=False):
            link, tensor = _Segment.apply(link, self, share, shape, 1, *sources)
            output.blocks[block], sources = tensor, [tensor]
            on_block(block, tensor)
        made = len(self.outer) + self.has_partial
        link, *tensors = _Segment.apply(link, self, self.shares[-1], shape, made, *sources)
        output.blocks.update(zip(self.outer, tensors, strict=False))
        output.partial = tensors[-1] if self.has_partial else None
        output.loss = link.sum() if self.is_last else None
        return output


class _Segment(torch.autograd.Function):
    """A share of a chunk: makes zeros of ``shape`` that depend on the segment before (``link``) and
    on ``sources``, and takes its time."""

    @staticmethod
    def forward(ctx, link, chunk, share, shape, made, *sources):
        ctx.chunk, ctx.share, ctx.shape, ctx.num_sources = chunk, share, shape, len(sources)
        tensors = [torch.zeros(shape) for _ in range(made)]
        chunk.clock += share * chunk.seconds
        sleep_until(chunk.clock)
        return link.clone(), *tensors

    @staticmethod
    def backward(ctx, *_):
        sleep_until(ctx.chunk.clock)  # of the next segment: what it gave is accumulated by now
        ctx.chunk.clock = time.monotonic() + 2 * ctx.share * ctx.chunk.seconds
        gradients = (torch.zeros(ctx.shape) for _ in range(ctx.num_sources))
        return torch.zeros(1), None, None, None, None, *gradients


class _BackwardEnd(torch.autograd.Function):
    """Applied first, so its backward runs last: when every gradient has been accumulated."""

    @staticmethod
    def forward(ctx, gate, chunk):
        ctx.chunk = chunk
        return gate.clone()

    @staticmethod
    def backward(ctx, gradient):
        sleep_until(ctx.chunk.clock)
        return gradient, None
