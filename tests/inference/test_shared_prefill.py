"""Prompts whose tokens ranks share: what each goes on from, and what comes then, is that of one
process, for every kind of layer and residual, prompts of any length, passes of any size."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from attnres_train.config.model_schema import ModelConfig
from attnres_train.inference.decoding import CachedDecoder
from attnres_train.inference.over_ranks import AT_ONCE, PlannedPasses
from attnres_train.inference.prefill import Piece, WholePrefill
from attnres_train.inference.scoring import losses_of
from attnres_train.inference.shared_prefill import SharedPrefill
from attnres_train.model.batch import MicroBatch
from attnres_train.model.chunk import ModelChunk
from attnres_train.pipeline.run.engine import Engine
from tests.model.tiny import VOCABULARY, build, tiny_config

TOKENS = torch.randint(VOCABULARY, (40,), generator=torch.Generator().manual_seed(2)).tolist()
LENGTHS = [1, 2, 5, 13, 24]
STEPS = 2
MODELS = {
    "block": tiny_config("block"),
    "full": tiny_config("full"),
    "standard": tiny_config("standard"),
    "MLA alone": tiny_config(full_attention_layers=[1, 2, 3, 4, 5]),
    "KDA alone": tiny_config(full_attention_layers=[]),
    "no convolution": tiny_config(
        kda={"num_heads": 2, "head_dim": 8, "chunk_size": 8, "short_conv_kernel_size": 1}
    ),
}


def model(config: ModelConfig) -> ModelChunk:
    return build(config, dtype=torch.float64).requires_grad_(False).eval()


def whole(config: ModelConfig) -> list[Tensor]:
    """Of each prompt the logits of its last token and of the next ones, by full passes."""
    chunk = model(config)
    tokens = torch.tensor([TOKENS])
    logits = chunk.logits(MicroBatch.of_tokens(tokens), {}, None)[0]
    return [logits[length - 1 : length + STEPS] for length in LENGTHS]


def cached(config: ModelConfig, most: int) -> dict[str, Any]:
    """On a rank: the same of all prompts together, and how many tokens its passes have had."""
    sizes: list[int] = []
    chunk = model(config)

    def run(pieces: Any) -> Tensor:
        found = []
        for piece in pieces:
            assert isinstance(piece, Piece)
            sizes.append(piece.tokens.shape[1])
            logits = chunk.go_on(piece.batch, {}, None, piece.pasts)[2]
            assert logits is not None
            found += [logits] if piece.asks else []
        return torch.cat(found)

    prefill = SharedPrefill(dist.group.WORLD, 1, most)
    layers, device = range(config.num_layers), torch.device("cpu")
    decoder = CachedDecoder(run, layers, device, prefill, losses_of(chunk))
    logits = [decoder.begin([TOKENS[:length] for length in LENGTHS], STEPS)]
    passes = list(sizes)
    for step in range(STEPS):
        logits.append(decoder.step([TOKENS[length + step] for length in LENGTHS]))
    return {"logits": torch.stack(logits, dim=1), "passes": passes}


@pytest.mark.parametrize(
    ("name", "ranks", "most"),
    [*((name, 2, 3) for name in MODELS), ("block", 3, 1), ("block", 3, 512)],
)
def test_logits_are_those_of_full_passes(pool: Any, name: str, ranks: int, most: int) -> None:
    """On every rank, of prompts shorter than the ranks are many and shares shorter than a
    convolution, too."""
    with torch.no_grad():
        expected = torch.stack(whole(MODELS[name]))
    for found in pool.run(partial(cached, MODELS[name], most), ranks):
        torch.testing.assert_close(found["logits"], expected, rtol=1e-10, atol=1e-10)


class OneStage:
    """An engine of one chunk that notes how many micro-batches it is given at once."""

    stage = SimpleNamespace(stream_dtype=torch.float64)

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def over(self, passes: Any, share: Any) -> OneStage:
        (self.run,) = passes.values()
        return self

    def evaluate(self, batches: list[Any]) -> None:
        self.sizes.append(len(batches))
        for batch in batches:
            self.run(batch, {}, None, None)


def test_pieces_go_through_a_pipeline_together() -> None:
    """Those of several prompts too, as many at once as stages have work with."""
    chunk, engine = model(MODELS["block"]), OneStage()
    ranks: Any = SimpleNamespace(
        pipeline=SimpleNamespace(size=lambda: 1), device=torch.device("cpu")
    )
    passes = PlannedPasses({0: chunk}, cast("Engine", engine), ranks)
    layers, prefill = range(chunk.config.num_layers), WholePrefill(2)
    decoder = CachedDecoder(passes, layers, ranks.device, prefill, losses_of(chunk))
    lengths = [7, 3]
    found = decoder.begin([TOKENS[:length] for length in lengths], 1)
    assert engine.sizes == [AT_ONCE, 4 + 2 - AT_ONCE]
    with torch.no_grad():
        expected = chunk.logits(MicroBatch.of_tokens(torch.tensor([TOKENS[:7]])), {}, None)[0]
    torch.testing.assert_close(found, expected[[6, 2]], rtol=1e-10, atol=1e-10)


def test_a_rank_passes_its_share(pool: Any) -> None:
    """No pass is of more than it is asked for; together they are the prompts, but for the last
    tokens, which each rank passes."""
    ranks, most = 3, 4
    for found in pool.run(partial(cached, MODELS["block"], most), ranks):
        assert max(found["passes"]) == most
        shared = sum((length - 1) // ranks for length in LENGTHS)
        last = sum((length - 1) % ranks + 1 for length in LENGTHS)
        assert sum(found["passes"]) == shared + last
