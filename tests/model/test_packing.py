"""Documents packed into samples, through KDA, short convolutions, MLA and experts: each is as if it
were alone. Lengths around the chunk of 8 tokens that KDA works in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnres_train.model.batch import MicroBatch
from attnres_train.model.chunk import ModelChunk
from tests.model.tiny import (
    assert_same_gradients,
    build_split,
    gradients,
    random_batch,
    run_split,
    tiny_config,
)

ROWS = [[1, 3, 7, 9, 12], [9, 1, 1, 15, 6], [7, 25], [32]]
RESIDUALS = [("standard", 1), ("full", 1), ("block", 3), ("block", 4)]


def packed_batch() -> MicroBatch:
    batch = random_batch(samples=len(ROWS), length=32, seed=4)
    lengths = torch.tensor([0, *(length for row in ROWS for length in row)])
    batch.cu_seqlens = lengths.cumsum(0).int()
    return batch


def documents(batch: MicroBatch) -> list[MicroBatch]:
    """Each document of ``batch`` as a micro-batch of one sample."""
    lengths = batch.cu_seqlens.diff().tolist()
    tensors = (batch.tokens, batch.labels, batch.loss_mask)
    parts = zip(*(x.flatten()[None].split(lengths, dim=1) for x in tensors), strict=True)
    return [MicroBatch(*part) for part in parts]


def token_losses(chunks: list[ModelChunk], batch: MicroBatch) -> Tensor:
    """Cross-entropy of each token, [B * T]."""
    *front, last = chunks
    blocks, partial = {}, None
    for chunk in front:
        output = chunk(batch, blocks, partial)
        blocks, partial = blocks | output.blocks, output.partial
    log_p = last.logits(batch, blocks, partial).log_softmax(-1)
    return -log_p.gather(-1, batch.labels[..., None]).flatten()


def model(kind: str, block_size: int, bounds: list[int], recompute: str) -> list[ModelChunk]:
    config = tiny_config(kind, block_size, kda={"num_heads": 2, "head_dim": 8, "chunk_size": 8})
    return build_split(config, bounds, recompute=recompute, dtype=torch.float64)


@pytest.mark.parametrize(("kind", "block_size"), RESIDUALS)
@pytest.mark.parametrize("bounds", [[0, 5], [0, 1, 3, 5]], ids=["whole", "chunks"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_packed_documents_equal_separate_ones(kind, block_size, bounds, recompute):
    chunks, batch = model(kind, block_size, bounds, recompute), packed_batch()
    alone = documents(batch)
    each = token_losses(chunks, batch)
    wanted = torch.cat([token_losses(chunks, document) for document in alone])
    torch.testing.assert_close(each, wanted, rtol=1e-10, atol=1e-12)

    run_split(chunks, batch).loss.backward()
    packed = gradients(chunks)
    packed = {name: grad.clone() for name, grad in packed.items()}
    for chunk in chunks:
        chunk.zero_grad()
    total = batch.loss_mask.double().sum()
    for document in alone:
        document.loss_tokens = total
        run_split(chunks, document).loss.backward()
    assert_same_gradients(packed, gradients(chunks), rtol=1e-10)


def test_without_borders_documents_do_see_each_other():
    """What the other tests would not notice if nothing passed from token to token."""
    chunks, batch = model("block", 3, [0, 5], "none"), packed_batch()
    apart = token_losses(chunks, batch).view(4, 32)
    batch.cu_seqlens = None
    together = token_losses(chunks, batch).view(4, 32)
    differs = (apart - together).abs() > 1e-6
    assert not differs[:, 0].any()
    assert differs[:3, 10:].all()
    assert not differs[3].any()
