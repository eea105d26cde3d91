"""A model small enough to run many times, and ways to run it whole or in chunks."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from attnres_train.config.model_schema import ModelConfig
from attnres_train.model.batch import MicroBatch
from attnres_train.model.chunk import ChunkOutput, ModelChunk
from attnres_train.model.init import init_weights
from attnres_train.model.naming import released_tensors

VOCABULARY = 61


def tiny_config(kind: str = "block", block_size: int = 3, **changes) -> ModelConfig:
    """Five layers (KDA, KDA, MLA, KDA, MLA; the first MLP dense): sublayer count 10."""
    residual = {"kind": kind, "block_size": block_size, **changes.pop("residual", {})}
    moe = {"num_experts": 4, "num_experts_per_token": 2, "intermediate_size": 12}
    mla = {"num_heads": 2, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4}
    values = {
        "hidden_size": 16,
        "num_layers": 5,
        "vocab_size": VOCABULARY,
        "intermediate_size": 24,
        "full_attention_interval": 3,
        "initializer_range": 0.2,
        "residual": residual,
        "kda": {"num_heads": 2, "head_dim": 8},
        "mla": {**mla, "v_head_dim": 8},
        "moe": {**moe, **changes.pop("moe", {})},
    }
    return ModelConfig(**{**values, **changes})


def random_batch(samples: int = 2, length: int = 20, seed: int = 0) -> MicroBatch:
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (samples, length + 1), generator=rng)
    mask = (torch.rand(samples, length, generator=rng) < 0.8).float()
    return MicroBatch(tokens[:, :-1], tokens[:, 1:], mask)


def build(
    config: ModelConfig, first: int = 0, last: int | None = None, *, seed: int = 7, **options
) -> ModelChunk:
    """An initialised chunk whose pseudo-queries are not zero, so that reads are no plain means."""
    chunk = ModelChunk(config, first, config.num_layers if last is None else last, **options)
    init_weights(chunk, seed)
    with torch.no_grad():
        for name, parameter in chunk.named_parameters():
            if name.endswith("_res_proj.weight"):
                rng = torch.Generator().manual_seed(sum(name.encode()))
                parameter.copy_(torch.randn(parameter.shape, generator=rng))
    return chunk


def build_split(config: ModelConfig, bounds: list[int], **options) -> list[ModelChunk]:
    """The same model in chunks of layers ``bounds[c] .. bounds[c + 1] - 1``."""
    return [build(config, *pair, **options) for pair in pairwise(bounds)]


def run_split(chunks: list[ModelChunk], batch: MicroBatch) -> ChunkOutput:
    """Run chunks one after the other, handing on every block and the partial."""
    blocks, partial, output = {}, None, None
    for chunk in chunks:
        output = chunk(batch, blocks, partial)
        assert not blocks.keys() & output.blocks.keys()
        blocks, partial = blocks | output.blocks, output.partial
    return output


def gradients(chunks: list[ModelChunk]) -> dict[str, Tensor]:
    """Gradients by released name; zeros where there is none."""
    return {
        name: grad
        for chunk in chunks
        for name, grad in released_tensors(
            (name, torch.zeros_like(p) if p.grad is None else p.grad)
            for name, p in chunk.named_parameters()
        )
    }


def assert_same_gradients(
    left: dict[str, Tensor], right: dict[str, Tensor], rtol: float, floor: float = 1e-30
) -> None:
    """Every tensor within ``rtol`` of its largest element, or of ``floor``, whichever is larger."""
    assert left.keys() == right.keys()
    for name, grad in left.items():
        scale = grad.abs().max().clamp_min(floor)
        assert (grad - right[name]).abs().max() <= rtol * scale, name
