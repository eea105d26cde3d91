"""A trained model that processes share, in fp64: logits after long prompts, of steps, and losses of
given texts are those of full passes in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from attnres_train.errors import UserError
from attnres_train.inference.decoding import CachedDecoder
from attnres_train.inference.joining import join_model
from attnres_train.inference.opening import Opened, open_model
from attnres_train.model.batch import MicroBatch
from tests.parity.pool import RankFailedError
from tests.tiny import TinyRuns, free_port, grid, torchrun_environment

CONTEXT = "parallel.context_parallel_size"
TENSOR = "parallel.tensor_model_parallel_size=2"
EXPERTS = "parallel.expert_model_parallel_size=2"
GRIDS = {
    "PP2 EP2": (4, [*grid(2, 1), EXPERTS]),
    "CP3": (3, [f"{CONTEXT}=3"]),
    "PP2 VPP2 CP2 EP2": (4, [*grid(2, 2), f"{CONTEXT}=2", EXPERTS]),
    "TP2 CP2 EP2": (4, [TENSOR, f"{CONTEXT}=2", EXPERTS]),
    "PP2 TP2": (4, [*grid(2, 1), TENSOR]),
}
TOKENS = torch.randint(1, 250, (1100,), generator=torch.Generator().manual_seed(4)).tolist()
LENGTHS = [1090, 7, 1]
"""Of prompts: of several pieces, even among several ranks, and of fewer tokens than ranks."""
Rows = list[list[int]]


def said(path: str, overrides: list[str], rows: Rows, port: int) -> dict[str, Any] | None:
    """What the model says, on the main rank."""
    with (
        torchrun_environment(port),
        join_model(path, overrides, "cpu", lambda saved: None, cpu_dtype=torch.float64) as joined,
    ):
        if joined is None:
            return None
        reader = joined[1]
        first = reader.score(rows)
        found = [reader.begin([TOKENS[:length] for length in LENGTHS], 3)]
        found.append(reader.step([TOKENS[length] for length in LENGTHS]))
        reader.keep([0, 2])
        found.append(reader.step([TOKENS[length + 1] for length in (LENGTHS[0], LENGTHS[2])]))
        return {"logits": found, "losses": [first, reader.score(rows[1:])]}


@pytest.fixture(scope="module")
def opened(tiny: TinyRuns) -> Opened:
    return open_model(tiny.train("opened-1"), dtype=torch.float64)


@pytest.fixture(scope="module")
def logits(opened: Opened) -> torch.Tensor:
    """Of every token, by one full pass."""
    with torch.no_grad():
        return opened.chunk.logits(MicroBatch.of_tokens(torch.tensor([TOKENS])), {}, None)[0]


@pytest.fixture(scope="module")
def rows(logits: torch.Tensor) -> Rows:
    """Of unequal lengths, one of which ends with the likeliest token."""
    return [TOKENS[:50], [TOKENS[0], int(logits[0].argmax())], TOKENS[100:133]]


@pytest.mark.parametrize("name", GRIDS)
def test_what_is_said_is_that_of_one_process(
    opened: Opened, logits: torch.Tensor, rows: Rows, tiny: TinyRuns, name: str
) -> None:
    ranks, overrides = GRIDS[name]
    found, *others = tiny.pool.run(said, ranks, str(opened.path), overrides, rows, free_port())
    assert others == [None] * (ranks - 1)
    ends = torch.tensor(LENGTHS) - 1
    for got, places in zip(found["logits"], (ends, ends + 1, ends[[0, 2]] + 2), strict=True):
        torch.testing.assert_close(got, logits[places], rtol=1e-10, atol=1e-10)
    for losses, scored in zip(found["losses"], (rows, rows[1:]), strict=True):
        check_losses(opened, losses, scored)
    assert found["losses"][0].is_best[1, 0]


def test_losses_of_one_process(opened: Opened, rows: Rows) -> None:
    check_losses(opened, CachedDecoder.of(opened.chunk).score(rows), rows)


@torch.no_grad()
def check_losses(opened: Opened, losses: Any, rows: Rows) -> None:
    """Against the logits of each text by itself."""
    assert losses.nats.shape == losses.is_best.shape == (len(rows), max(map(len, rows)) - 1)
    for place, row in enumerate(rows):
        batch = MicroBatch.of_tokens(torch.tensor([row[:-1]]))
        of_row = opened.chunk.logits(batch, {}, None)[0]
        labels, here = torch.tensor(row[1:]), slice(len(row) - 1)
        nats = torch.nn.functional.cross_entropy(of_row, labels, reduction="none")
        torch.testing.assert_close(losses.nats[place, here], nats, rtol=1e-10, atol=1e-10)
        assert torch.equal(losses.is_best[place, here], of_row.argmax(-1) == labels)


def failing(path: str, port: int) -> None:
    def prepare(saved: Any) -> None:
        raise UserError("there is nothing to say")

    with torchrun_environment(port), join_model(path, grid(2, 1), "cpu", prepare):
        raise AssertionError("nobody gets here")


def test_what_is_wrong_on_the_main_rank_is_told_on_all(tiny: TinyRuns, opened: Opened) -> None:
    path: Path = opened.path
    with pytest.raises(RankFailedError, match=r"UserError: (rank 0 .*)?there is nothing to say"):
        tiny.pool.run(failing, 2, str(path), free_port())
