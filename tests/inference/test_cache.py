"""Cached passes make what one pass over all tokens makes: every kind of layer and of residual,
wherever the passes are cut, for rows of any lengths."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from attnres_train.inference.cache import Cache
from attnres_train.model import latent
from attnres_train.model.batch import MicroBatch
from attnres_train.model.chunk import ModelChunk
from tests.model.tiny import VOCABULARY, build, build_split, tiny_config

RESIDUALS: list[dict] = [
    {"kind": "standard"},
    {"kind": "full"},
    {"kind": "block", "block_size": 2},
    {"kind": "block", "block_size": 3},
    {"kind": "block", "two_phase": False},
    {"kind": "block", "query": "input"},
    {"kind": "full", "window": 2},
    {"kind": "block", "normalizer": "sigmoid", "num_heads": 2},
    {"kind": "dense_former"},
    {"kind": "mhc_lite"},
    {"kind": "tests.model.residual.layer_scale:LayerScale"},
]
LENGTH = 21


def tokens_of(rows: int, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def go_on(chunk: ModelChunk, tokens: Tensor, cache: Cache) -> Tensor:
    logits = chunk.go_on(MicroBatch.of_tokens(tokens), {}, None, cache.pasts)[2]
    assert logits is not None
    return logits


def whole(chunk: ModelChunk, tokens: Tensor) -> Tensor:
    return chunk.logits(MicroBatch.of_tokens(tokens), {}, None)


def new_cache(chunk: ModelChunk) -> Cache:
    return Cache(range(chunk.first_layer, chunk.last_layer))


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("residual", RESIDUALS, ids=str)
@torch.no_grad()
def test_every_residual(residual: dict) -> None:
    """Two passes of a prompt, then token by token; what reads learn is far from where it begins."""
    chunk = build(tiny_config(residual=residual), dtype=torch.float64)
    for name, parameter in chunk.named_parameters():
        if "_res_" in name or "layer_scale" in name:
            rng = torch.Generator().manual_seed(sum(name.encode()))
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=rng, dtype=torch.float64))
    tokens, cache = tokens_of(2), new_cache(chunk)
    expected = whole(chunk, tokens)
    borders = [0, 7, 13, *range(14, LENGTH + 1)]
    for start, end in pairwise(borders):
        assert_same(go_on(chunk, tokens[:, start:end], cache), expected[:, end - 1])


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 20, LENGTH])
@pytest.mark.parametrize("scores", [64, 1 << 22])
@torch.no_grad()
def test_passes_of_any_size(size: int, scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorter than a convolution, longer than a chunk of KDA, latents in one tile or many."""
    monkeypatch.setattr(latent, "_SCORES", scores)
    kda = {"num_heads": 2, "head_dim": 8, "chunk_size": 8}
    chunk = build(tiny_config(kda=kda), dtype=torch.float64)
    tokens, cache = tokens_of(3), new_cache(chunk)
    expected = whole(chunk, tokens)
    for piece in torch.arange(LENGTH).split(size):
        assert_same(go_on(chunk, tokens[:, piece], cache), expected[:, piece[-1]])


@pytest.mark.parametrize("layers", [[1, 2, 3, 4, 5], []], ids=["MLA alone", "KDA alone"])
@torch.no_grad()
def test_models_of_one_kind_of_layer(layers: list[int]) -> None:
    config = tiny_config(full_attention_layers=layers)
    chunk = build(config, dtype=torch.float64)
    tokens, cache = tokens_of(2), new_cache(chunk)
    expected = whole(chunk, tokens)
    for start, end in pairwise([0, 3, 17, 18, 19, LENGTH]):
        assert_same(go_on(chunk, tokens[:, start:end], cache), expected[:, end - 1])


@torch.no_grad()
def test_rows_of_unequal_lengths() -> None:
    """Rows that had 1, 9 and 4 tokens go on together; one leaves, others join."""
    chunk = build(tiny_config(), dtype=torch.float64)
    tokens, lengths = tokens_of(3), [1, 9, 4]
    expected = whole(chunk, tokens)

    def prompt(row: int) -> Cache:
        cache = new_cache(chunk)
        last = go_on(chunk, tokens[row : row + 1, : lengths[row]], cache)
        assert_same(last[0], expected[row, lengths[row] - 1])
        return cache

    cache, rows = Cache.stacked([prompt(0), prompt(1)], room=2), [0, 1]

    def steps(count: int) -> None:
        for _ in range(count):
            new = torch.stack([tokens[row, lengths[row]] for row in rows]).unsqueeze(1)
            logits = go_on(chunk, new, cache)
            for place, row in enumerate(rows):
                assert_same(logits[place], expected[row, lengths[row]])
                lengths[row] += 1

    steps(4)
    cache, rows = Cache.stacked([cache, prompt(2)]), [0, 1, 2]
    steps(3)
    cache.keep(torch.tensor([2, 0]))
    rows = [2, 0]
    steps(3)
    # Several at once, of rows that begin at different places.
    new = torch.stack([tokens[row, lengths[row] : lengths[row] + 5] for row in rows])
    logits = go_on(chunk, new, cache)
    for place, row in enumerate(rows):
        assert_same(logits[place], expected[row, lengths[row] + 4])


@torch.no_grad()
def test_documents_that_were_packed() -> None:
    """Each by itself, as the packed sample made them."""
    chunk = build(tiny_config(), dtype=torch.float64)
    tokens = tokens_of(1)
    batch = MicroBatch.of_tokens(tokens)
    batch.cu_seqlens = torch.tensor([0, 8, 13, LENGTH], dtype=torch.int32)
    expected = chunk.logits(batch, {}, None)
    for start, end in pairwise(batch.cu_seqlens.tolist()):
        cache = new_cache(chunk)
        for piece in torch.arange(start, end).split(3):
            assert_same(go_on(chunk, tokens[:, piece], cache), expected[:, piece[-1]])


@torch.no_grad()
def test_a_model_in_chunks() -> None:
    """Each has the pasts of its own layers."""
    chunks = build_split(tiny_config(), [0, 2, 3, 5], dtype=torch.float64)
    tokens, caches = tokens_of(2), [new_cache(chunk) for chunk in chunks]
    expected = whole(build(tiny_config(), dtype=torch.float64), tokens)
    for start, end in pairwise([0, 9, 10, LENGTH]):
        blocks: dict[int, Tensor] = {}
        partial = logits = None
        for chunk, cache in zip(chunks, caches, strict=True):
            batch = MicroBatch.of_tokens(tokens[:, start:end])
            completed, partial, logits = chunk.go_on(batch, blocks, partial, cache.pasts)
            assert (logits is not None) == chunk.is_last
            blocks |= completed
        assert logits is not None
        assert_same(logits, expected[:, end - 1])


@torch.no_grad()
def test_what_is_kept() -> None:
    """Of KDA as much whatever the length, in fp32 where the model is bf16; of MLA a latent and a
    shared key per token."""
    config = tiny_config()
    chunk = build(config, dtype=torch.bfloat16)
    cache = new_cache(chunk)
    go_on(chunk, tokens_of(2, 9), cache)
    before = cache.nbytes
    kda, mla = cache.pasts[0], cache.pasts[2]
    assert kda.state is not None
    assert kda.state.dtype == torch.float32
    assert kda.state.shape == (2, 2, 8, 8)
    assert kda.tail is not None
    assert kda.tail.shape == (2, 3, 3 * 16)
    go_on(chunk, tokens_of(2, 1), cache)
    assert mla.length == 10
    assert mla.latents is not None
    assert mla.latents.shape[-1] == 8 + 4
    assert mla.latents.dtype == torch.bfloat16
    room = 10 + 10 // 2
    assert (
        cache.nbytes - before == 2 * 2 * (room - 9) * 12 * 2
    )  # layers, rows, tokens, numbers, bytes
