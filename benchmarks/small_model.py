"""A small real model for the pipeline benchmark: KDA and MLA layers, dense MLPs and experts.

Shapes: one sample of T tokens, D hidden_size; a unit is T x D in fp32, 512 KiB.
"""

from __future__ import annotations

import torch

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
from attnres_train.pipeline.layout import Layout, make_layout

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


def make_chunk(layout: Layout, index: int) -> ModelChunk:
    layers = layout.layers(index)
    chunk = ModelChunk(config(layout.blocks.block_size), layers.start, layers.stop)
    init_weights(chunk, seed=1)
    return chunk


def make_batch() -> MicroBatch:
    tokens = torch.arange(TOKENS).remainder(VOCABULARY).view(1, TOKENS)
    return MicroBatch(tokens, tokens, torch.ones(1, TOKENS))
