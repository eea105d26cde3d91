"""Runs whose samples hold several documents: what they train on may not depend on how the run is
spread, nor on how its tokens fall into micro-batches."""

from __future__ import annotations

from unittest.mock import patch

import pytest

from attnres_train.data.loader import open_data
from attnres_train.data.prepare import prepare
from attnres_train.model.flops import forward_flops_per_token
from tests.data.tiny import write_text
from tests.tiny import column, free_port, grid, records, train_rank

PACKED = [
    "data.reset_at_documents=true",
    "data.mask_document_ends=true",
    "train.global_batch_size=8",
]


@pytest.fixture(scope="module")
def packed(tiny, tmp_path_factory):
    """Overrides for a corpus of documents shorter than a sample."""
    folder = write_text(tmp_path_factory.mktemp("short"), 150, lines=1)
    return [*PACKED, f"data.corpus=[{{kind: text, path: {folder}}}]"]


@pytest.fixture(scope="module")
def whole(tiny, packed):
    return tiny.train("packed", *packed, "train.micro_batch_size=8")


@pytest.mark.parametrize(
    ("spread", "ranks"),
    [
        pytest.param(["train.micro_batch_size=1"], 1, marks=pytest.mark.nightly),
        (["train.micro_batch_size=1"], 2),
        ([*grid(2, 2), "train.micro_batch_size=2"], 2),
    ],
    ids=["micro-batches", "replicas", "pipeline"],
)
def test_the_loss_is_the_mean_over_the_tokens_of_a_step(tiny, packed, whole, spread, ranks):
    run = tiny.train(f"packed-{'-'.join(spread)}-{ranks}", *packed, *spread, ranks=ranks)
    for key in ("loss", "validation_loss", "grad_norm"):
        assert column(run, key) == pytest.approx(column(whole, key), rel=1e-4), key


def test_micro_batches_differ_in_their_number_of_tokens(tiny, packed, whole):
    """The mean of the micro-batches' own means would be another number."""
    config = tiny.config(*packed, "train.micro_batch_size=1")
    batches = open_data(config, prepare(config, progress=False)).micro_batches(0, 0, 1)
    assert len({batch["loss_mask"].sum().item() for batch in batches}) > 1
    assert max(len(batch["cu_seqlens"]) for batch in batches) > 2


def test_documents_are_kept_apart(tiny, packed, whole):
    together = tiny.train("together", *packed, "data.reset_at_documents=false")
    assert column(together, "loss")[0] != column(whole, "loss")[0]


def train_rank_of_known_peak(arguments, port):
    """As `train_rank`, on a device of 1 GFLOP/s."""
    with patch("attnres_train.training.building.peak_flops", return_value=1e9):
        train_rank(arguments, port)


def test_mfu_counts_attention_within_documents(tiny, packed):
    """Of two replicas, against sum(n^2) / sum(n) of all documents of n tokens in each step."""
    overrides = [*packed, "train.micro_batch_size=2", "train.train_iters=2", "run.name=known-peak"]
    arguments = [str(tiny.path), *overrides]
    tiny.pool.run(train_rank_of_known_peak, 2, arguments, free_port())
    config = tiny.config(*overrides)
    data = open_data(config, prepare(config, progress=False))
    for step, record in enumerate(records(tiny.folder / "runs" / "known-peak")):
        batches = data.micro_batches(8 * step, 0, 1)
        lengths = [n for batch in batches for n in batch["cu_seqlens"].diff().tolist()]
        assert sum(lengths) == 8 * 32
        mean = sum(n * n for n in lengths) / sum(lengths)
        assert mean < 32
        flops = 3 * 8 * 32 * sum(forward_flops_per_token(config.model, mean).values())
        assert record["mfu"] == pytest.approx(flops / (2 * 1e9 * record["step_seconds"]))
