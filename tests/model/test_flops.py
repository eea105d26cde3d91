"""FLOP counts against counts by hand and the published figures of Kimi-Linear-48B-A3B."""

from __future__ import annotations

import pytest
import torch

from attnres_train.config.model_schema import ModelConfig
from attnres_train.model.batch import MicroBatch
from attnres_train.model.flops import (
    forward_flops_per_token,
    layer_flops_per_token,
    mean_document_length,
    training_flops_per_token,
)
from tests.model.tiny import tiny_config


def kimi_linear(**residual) -> ModelConfig:
    return ModelConfig(hidden_size=2304, num_layers=27, vocab_size=163840, residual=residual)


def test_tiny_model_by_hand():
    parts = forward_flops_per_token(tiny_config("block", 3), seq_length=20)
    mla_weights = 16 * 2 * 12 + 16 * 12 + 8 * 2 * 16 + 16 * 16
    assert parts["mla"] == 2 * (2 * mla_weights + 2 * 20 * (12 + 8))
    assert parts["dense"] == 2 * 3 * 16 * 24
    assert parts["moe"] == 4 * 2 * (16 * 4 + (2 + 1) * 3 * 16 * 12)
    assert parts["head"] == 2 * 16 * 61
    sources = [1, 2, 2, 2, 3, 3, 3, 4, 4, 4]  # ten sublayers in blocks of three
    assert parts["depth_reads"] == 6 * 16 * (sum(sources) + 5)


def test_48b_forward_at_4096():
    parts = forward_flops_per_token(kimi_linear(kind="standard"), 4096)
    assert "depth_reads" not in parts
    assert parts["head"] == pytest.approx(0.755e9, rel=1e-3)
    attention = 7 * 32 * 4096 * (192 + 128)
    assert attention == pytest.approx(293.6e6, rel=1e-3)
    recurrence = 20 * 32 * 126_976
    assert recurrence == pytest.approx(81.3e6, rel=1e-3)
    weights = sum(parts.values()) - parts["head"] - attention - recurrence
    assert weights == pytest.approx(2 * 2.729e9, rel=1e-3)
    assert sum(parts.values()) == pytest.approx(6.59e9, rel=1e-3)


def test_48b_depth_reads():
    block = forward_flops_per_token(kimi_linear(kind="block", block_size=6), 4096)
    assert block["depth_reads"] == 6 * 2304 * (315 + 10)
    full = forward_flops_per_token(kimi_linear(kind="full"), 4096)
    assert full["depth_reads"] == 6 * 2304 * (54 * 55 // 2 + 55)


def test_layers_and_head_sum_to_the_model():
    config = tiny_config("standard")
    layers = [layer_flops_per_token(config, i, 20) for i in range(config.num_layers)]
    assert [sorted(parts) for parts in layers] == [
        ["dense", "kda"],
        ["kda", "moe"],
        ["mla", "moe"],
        ["kda", "moe"],
        ["mla", "moe"],
    ]
    forward = sum(forward_flops_per_token(config, 20).values())
    assert forward == sum(sum(parts.values()) for parts in layers) + 2 * 16 * 61
    assert training_flops_per_token(config, 20) == 3 * forward


def test_attention_costs_packed_documents_what_they_cost_alone():
    """Two rows of 10 tokens; a document of n has n^2 / 2 pairs per head, 12 + 8 channels each."""
    tokens = torch.zeros(2, 10, dtype=torch.int64)
    batch = MicroBatch(tokens, tokens, tokens.float(), torch.tensor([0, 3, 3, 14, 20]))
    lengths = [3, 7, 4, 6]  # the end of a row ends a document
    pairs = sum(n * n / 2 for n in lengths)
    config = tiny_config("standard")
    length = mean_document_length(batch)
    attention, weights = (forward_flops_per_token(config, n)["mla"] for n in (length, 0))
    assert 20 * (attention - weights) == pytest.approx(2 * 2 * 2 * pairs * (12 + 8))
    batch.cu_seqlens = None
    assert mean_document_length(batch) == 10
