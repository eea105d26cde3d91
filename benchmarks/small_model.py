"""A small real model for the pipeline benchmark: KDA and MLA layers, dense MLPs and experts.

Shapes: one sample of T tokens, D hidden_size; a unit is T x D in fp32, 512 KiB.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from attnres_train.config.model_schema import (
    KDAConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    ResidualConfig,
)
from attnres_train.model.batch import MicroBatch
from attnres_train.model.chunk import ChunkOutput, ModelChunk
from attnres_train.model.init import init_weights
from attnres_train.pipeline.plan.layout import Layout, make_layout
from attnres_train.pipeline.plan.transport_plan import TransportPlan
from paced import Pace
from transports import NaivePlan

TOKENS, HIDDEN_SIZE, VOCABULARY = 512, 256, 512
LAYERS, BLOCK_SIZE = 8, 2


def config(block_size: int | None) -> ModelConfig:
    kind = "standard" if block_size is None else "block"
    return ModelConfig(
        hidden_size=HIDDEN_SIZE,
        num_layers=LAYERS,
        vocab_size=VOCABULARY,
        intermediate_size=2 * HIDDEN_SIZE,
        residual=ResidualConfig(kind=kind, block_size=block_size or 1),
        kda=KDAConfig(num_heads=4, head_dim=32),
        mla=MLAConfig(
            num_heads=4, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32
        ),
        moe=MoEConfig(num_experts=4, num_experts_per_token=2, intermediate_size=HIDDEN_SIZE),
    )


def layout(ranks: int, virtual: int, block_size: int | None) -> Layout:
    return make_layout(LAYERS, block_size, ranks, virtual)


def make_model(layout: Layout, index: int, seconds: float | None = None) -> ModelChunk:
    """Chunk ``index`` of the model; ``seconds``: how long its forward pass takes (see `paced`;
    None: as long as it does)."""
    layers = layout.layers(index)
    chunk = ModelChunk(config(layout.blocks.block_size), layers.start, layers.stop)
    init_weights(chunk, seed=1)
    if seconds is not None:
        Pace(chunk, seconds)
    return chunk


def make_chunk(plan: TransportPlan, index: int, model: ModelChunk) -> nn.Module:
    """``model``, the chunk's, as ``plan`` wants it. Several plans can share it."""
    return model if type(plan) is TransportPlan else Carrier(model, plan, index)


class Carrier(nn.Module):
    """``chunk`` under one of the other `transports`: it also takes and makes their surplus tensors,
    and tells nobody of its blocks before its pass is over."""

    def __init__(self, chunk: ModelChunk, plan: TransportPlan, index: int) -> None:
        super().__init__()
        self.chunk, self.produced = chunk, plan.produced(index)
        self.reads = TransportPlan(plan.layout).reads(index)
        self.passes_on = isinstance(plan, NaivePlan)

    def forward(
        self, batch: MicroBatch, blocks: dict[int, Tensor], partial: Tensor | None, *_: object
    ) -> ChunkOutput:
        count = len(self.reads)
        sources, padding = list(blocks.values())[:count], list(blocks.values())[count:]
        if padding:
            sources[0] = _Attach.apply(sources[0], *padding)
        output = self.chunk(batch, dict(zip(self.reads, sources, strict=True)), partial)
        made = list(output.blocks.values())
        if self.passes_on:
            made = [*(source.view_as(source) for source in sources), *made]
        surplus = len(self.produced) - len(made)
        made += [torch.zeros(*batch.tokens.shape, HIDDEN_SIZE) for _ in range(surplus)]
        return replace(output, blocks=dict(zip(self.produced, made, strict=False)))


class _Attach(torch.autograd.Function):
    """Makes a tensor depend on ``padding``, whose gradients are zero."""

    @staticmethod
    def forward(ctx, tensor, *padding):
        ctx.count = len(padding)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, *(torch.zeros_like(gradient) for _ in range(ctx.count))


def make_batch() -> MicroBatch:
    tokens = torch.arange(TOKENS).remainder(VOCABULARY).view(1, TOKENS)
    return MicroBatch(tokens, tokens, torch.ones(1, TOKENS))
