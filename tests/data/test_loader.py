from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnres_train.data.loader import BatchSource, open_data
from attnres_train.data.prepare import open_tokenizer, prepare
from attnres_train.errors import UserError
from tests.data.tiny import run_config, text_corpus, write_text

T = 3


class Numbered:
    """Sample i holds the token i (plus an offset that tells training from validation)."""

    def __init__(self, offset: int = 0) -> None:
        self.offset = offset

    def __getitem__(self, index: int) -> dict[str, Any]:
        token = torch.full((T,), index + self.offset)
        return {"tokens": token, "labels": token + 1, "loss_mask": torch.ones(T)}


def source(tmp_path, micro_batch_size: int, global_batch_size: int) -> BatchSource:
    config = run_config(
        tmp_path,
        [text_corpus(tmp_path)],
        train__micro_batch_size=micro_batch_size,
        train__global_batch_size=global_batch_size,
        model__vocab_size=5000,
    )
    return BatchSource(Numbered(), Numbered(1000), config)


def dealt(batches) -> list[list[int]]:
    return [batch["tokens"][:, 0].tolist() for batch in batches]


def test_shapes_and_dtypes(tmp_path):
    (first, _) = source(tmp_path, 2, 4).micro_batches(0, 0, 1)
    assert first["tokens"].shape == first["labels"].shape == first["loss_mask"].shape == (2, T)
    assert first["tokens"].dtype == first["labels"].dtype == torch.int64
    assert first["loss_mask"].dtype == torch.float32
    assert set(first) == {"tokens", "labels", "loss_mask"}


def test_dealing_by_hand(tmp_path):
    batches = source(tmp_path, 2, 8)
    assert dealt(batches.micro_batches(8, 0, 1)) == [[8, 9], [10, 11], [12, 13], [14, 15]]
    assert dealt(batches.micro_batches(8, 0, 2)) == [[8, 9], [12, 13]]
    assert dealt(batches.micro_batches(8, 1, 2)) == [[10, 11], [14, 15]]


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(0, 50))
def test_any_number_of_ranks_shares_out_the_same_samples(tmp_path_factory, size, ranks, m, step):
    global_batch = size * ranks * m
    batches = source(tmp_path_factory.mktemp("deal"), size, global_batch)
    consumed = step * global_batch
    parts = [dealt(batches.micro_batches(consumed, rank, ranks)) for rank in range(ranks)]
    assert [len(part) for part in parts] == [m] * ranks
    samples = sorted(i for part in parts for micro_batch in part for i in micro_batch)
    assert samples == list(range(consumed, consumed + global_batch))


class Packed:
    """Samples of six tokens; 9 ends a document, and sample 1 has the end of a sequence too."""

    tokens = torch.tensor([[1, 9, 2, 3, 9, 9], [4, 5, 6, 7, 8, 1], [1, 2, 3, 4, 5, 9]])
    ends = np.zeros((3, 6), bool)
    ends[1, 1] = True

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens = self.tokens[index]
        row = {"tokens": tokens, "labels": tokens.roll(-1), "loss_mask": torch.ones(6)}
        return row | {"sequence_ends": self.ends[index]}


def packed_batch(tmp_path, **changes) -> dict[str, torch.Tensor]:
    config = run_config(
        tmp_path, [text_corpus(tmp_path)], train__micro_batch_size=3, train__global_batch_size=3
    )
    for key, value in changes.items():
        setattr(config.data, key, value)
    (batch,) = BatchSource(Packed(), None, config, eod=9).micro_batches(0, 0, 1)
    assert torch.equal(batch["tokens"], Packed.tokens)
    return batch


def test_documents_of_a_batch_by_hand(tmp_path):
    batch = packed_batch(tmp_path, reset_at_documents=True)
    assert batch["cu_seqlens"].tolist() == [0, 2, 5, 6, 8, 12, 18]
    assert batch["cu_seqlens"].dtype == torch.int32
    assert batch["loss_mask"].min() == 1


def test_document_ends_out_of_the_loss_by_hand(tmp_path):
    batch = packed_batch(tmp_path, mask_document_ends=True)
    assert "cu_seqlens" not in batch
    assert batch["loss_mask"].tolist() == [[1, 0, 1, 1, 0, 0], [1, 0, 1, 1, 1, 1], [1] * 5 + [0]]


def test_documents_of_a_corpus(tmp_path):
    """Every document is a whole file's tokens, or what the borders of its sample leave of it."""
    corpora = [text_corpus(write_text(tmp_path / "a", 30, lines=1))]
    config = run_config(
        tmp_path / "cache",
        corpora,
        train__seq_length=150,
        train__micro_batch_size=2,
        data__tokenizer__vocab_size=257,
        data__reset_at_documents=True,
    )
    prepared = prepare(config, progress=False)
    tokenizer = open_tokenizer(config, prepared)
    texts = {file.read_text() for file in (tmp_path / "a").iterdir()}
    whole = 0
    for batch in open_data(config, prepared).micro_batches(0, 0, 1):
        lengths = batch["cu_seqlens"].diff().tolist()
        for ids in batch["tokens"].flatten().split(lengths):
            assert tokenizer.eod not in ids[:-1].tolist()
            text = tokenizer.decode(ids[: -1 if ids[-1] == tokenizer.eod else None].tolist())
            assert any(text in other for other in texts)
            whole += text in texts
    assert whole >= 4

    plain = config.model_copy(deep=True)
    plain.data.reset_at_documents = False
    pairs = zip(
        open_data(plain, prepare(plain, progress=False)).micro_batches(4, 0, 1),
        open_data(config, prepared).micro_batches(4, 0, 1),
        strict=True,
    )
    for without, with_documents in pairs:
        assert "cu_seqlens" not in without
        assert all(torch.equal(without[name], with_documents[name]) for name in without)


def test_validation_batches_are_fixed(tmp_path):
    batches = source(tmp_path, 1, 2)
    assert dealt(batches.validation_batches(0, 0, 1)) == [[1000], [1001]]
    assert dealt(batches.validation_batches(3, 1, 2)) == [[1007]]


def test_ids_outside_the_vocabulary_are_caught(tmp_path):
    batches = source(tmp_path, 2, 2)
    with pytest.raises(UserError, match="the batch of samples 5000 to 5001 holds token id 5001"):
        batches.micro_batches(5000, 0, 1)
    with pytest.raises(UserError, match=r"token id 5000, but model\.vocab_size is 5000"):
        # The last label alone is outside.
        batches.micro_batches(4998, 0, 1)


def test_open_data_reads_what_prepare_made(tmp_path):
    corpora = [
        text_corpus(write_text(tmp_path / "a", 20), weight=3.0),
        text_corpus(write_text(tmp_path / "b", 20, first=500)),
    ]
    config = run_config(tmp_path / "cache", corpora, train__eval_interval=5)
    prepared = prepare(config, progress=False)
    before = sorted((tmp_path / "cache").rglob("*"))
    data = open_data(config, prepared)
    one = data.micro_batches(8, 0, 1)
    halves = [data.micro_batches(8, rank, 2) for rank in (0, 1)]
    assert torch.equal(
        torch.cat([batch["tokens"] for batch in one]),
        torch.cat([batch["tokens"] for pair in zip(*halves, strict=True) for batch in pair]),
    )
    again = open_data(config, prepared)
    assert torch.equal(again.micro_batches(8, 0, 1)[3]["labels"], one[3]["labels"])
    assert len(data.validation_batches(9, 0, 1)) == 4
    assert sorted((tmp_path / "cache").rglob("*")) == before, "workers only read"


def test_a_longer_run_with_other_batches_has_the_same_samples(tmp_path):
    corpora = [text_corpus(write_text(tmp_path / "a", 20))]
    config = run_config(tmp_path / "cache", corpora)
    prepared = prepare(config, progress=False)
    tokens = torch.cat([b["tokens"] for b in open_data(config, prepared).micro_batches(0, 0, 1)])
    longer = run_config(
        tmp_path / "cache",
        corpora,
        train__train_iters=1000,
        train__global_batch_size=8,
        train__micro_batch_size=4,
    )
    (first, _) = open_data(longer, prepared).micro_batches(0, 0, 1)
    assert torch.equal(first["tokens"], tokens)


def test_no_validation_where_none_is_asked_for(tmp_path):
    corpora = [text_corpus(write_text(tmp_path / "a", 4))]
    config = run_config(tmp_path / "cache", corpora, data__split=(1.0, 0.0))
    data = open_data(config, prepare(config, progress=False))
    assert data.valid is None
    assert len(data.micro_batches(0, 0, 1)) == 4


def test_open_data_whose_cache_is_gone(tmp_path):
    config = run_config(tmp_path / "cache", [text_corpus(write_text(tmp_path / "a", 4))])
    prepared = prepare(config, progress=False)
    shutil.rmtree(prepared.indices)
    with pytest.raises(UserError, match="run `attnres-train data CONFIG` again"):
        open_data(config, prepared)
    shutil.rmtree(tmp_path / "cache" / "shards")
    with pytest.raises(UserError, match=r"there is no file .*shards"):
        open_data(config, prepared)
