"""A real chunk on a slower processor: its passes take a given time, and leave the network some CPU.

On this machine's cores a chunk that computes in earnest takes them from gloo and the links, which
an accelerator would not. Here every sublayer computes, then sleeps for what is left of its share.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from attnres_train.model.chunk import ModelChunk
from chunks import sleep_until


class Pace:
    """Makes forward passes of ``chunk`` take ``seconds`` and backward passes twice that, in equal
    shares of its sublayers; what takes longer is not shortened. Waiting is not part of the time: in
    a backward pass for a gradient, before a layer for its parameters (in hooks that the chunk and
    its layers have by now)."""

    def __init__(self, chunk: ModelChunk, seconds: float) -> None:
        self.share = seconds / (2 * len(chunk.layers))
        self.clock = self.waiting_since = 0.0
        chunk.register_forward_pre_hook(self._begin)
        if chunk.is_first:
            chunk.embed_tokens.register_forward_hook(lambda *args: _Begin.apply(args[-1], self))
        for layer in chunk.layers.values():
            layer.register_forward_pre_hook(self._begin_wait, prepend=True)
            layer.register_forward_pre_hook(self._end_wait)
            mlp = layer.mlp if hasattr(layer, "mlp") else layer.block_sparse_moe
            for sublayer in (layer.self_attn, mlp):
                sublayer.register_forward_hook(self._end_sublayer)

    def _begin(self, _: nn.Module, args: tuple) -> tuple:
        self.clock = time.monotonic()
        batch, blocks, partial, *rest = args
        blocks = {block: _Begin.apply(tensor, self) for block, tensor in blocks.items()}
        partial = partial if partial is None else _Begin.apply(partial, self)
        return batch, blocks, partial, *rest

    def _begin_wait(self, *_: object) -> None:
        self.waiting_since = time.monotonic()

    def _end_wait(self, *_: object) -> None:
        self.clock += time.monotonic() - self.waiting_since

    def _end_sublayer(self, _: nn.Module, args: tuple, output: Any) -> Any:
        if isinstance(output, tuple):
            return _EndSublayer.apply(output[0], self), *output[1:]
        return _EndSublayer.apply(output, self)


class _Begin(torch.autograd.Function):
    """Before a chunk's first sublayer, where its backward pass ends."""

    @staticmethod
    def forward(ctx, tensor: Tensor, pace: Pace) -> Tensor:
        ctx.pace = pace
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        sleep_until(ctx.pace.clock)
        return gradient, None


class _EndSublayer(torch.autograd.Function):
    """After a sublayer: its forward time ends and its backward time begins."""

    @staticmethod
    def forward(ctx, tensor: Tensor, pace: Pace) -> Tensor:
        ctx.pace = pace
        pace.clock += pace.share
        sleep_until(pace.clock)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        sleep_until(ctx.pace.clock)  # of the next sublayer, with the read of its input
        ctx.pace.clock = time.monotonic() + 2 * ctx.pace.share
        return gradient, None
