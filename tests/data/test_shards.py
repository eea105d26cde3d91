from __future__ import annotations

import itertools
import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnres_train.config.data_schema import CorpusConfig, DataConfig
from attnres_train.data import shard_writer, shards
from attnres_train.data.corpora.reader import CorpusReader, Passage, find_corpora
from attnres_train.data.megatron import megatron_datasets
from attnres_train.data.shard_writer import ShardWriter
from attnres_train.data.shards import (
    batches,
    group_files,
    is_whole,
    shard_prefixes,
    text_hashes,
    tokenise,
)
from attnres_train.errors import UserError
from tests.data.tiny import write_jsonl, write_text


class Bytes:
    """A tokenizer whose ids are UTF-8 bytes. Remembers what it was asked; may be told to fail."""

    vocab_size, eod = 257, 256

    def __init__(self, fail_at: str | None = None) -> None:
        self.fail_at = fail_at
        self.batch_chars: list[int] = []

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        if self.fail_at is not None and any(self.fail_at in text for text in texts):
            raise KeyboardInterrupt
        self.batch_chars.append(sum(len(text) for text in texts))
        return [list(text.encode()) for text in texts]


def corpus_of(path: Path, kind: str = "text") -> CorpusReader:
    return find_corpora(DataConfig(corpus=[CorpusConfig(kind=kind, path=str(path))]))[0]


def read_documents(folder: Path) -> list[str]:
    """Through megatron-core alone."""
    indexed_dataset = megatron_datasets("indexed_dataset")
    texts = []
    for prefix in shard_prefixes(folder):
        data = indexed_dataset.IndexedDataset(prefix)
        marks = data.document_indices
        for start, stop in itertools.pairwise(marks):
            ids = [token for sequence in data[start:stop] for token in sequence.tolist()]
            assert ids[-1] == Bytes.eod and Bytes.eod not in ids[:-1]
            texts.append(bytes(ids[:-1]).decode())
    return texts


def test_megatron_reads_our_shards(tmp_path):
    texts = ["one", "", "twö", "three\n"]
    corpus = corpus_of(write_jsonl(tmp_path / "rows.jsonl", texts), "jsonl")
    counts = tokenise(corpus, Bytes(), tmp_path / "out", progress=False)
    assert (counts.documents, counts.empty_documents, counts.tokens) == (3, 1, 3 + 4 + 6 + 3)
    assert read_documents(tmp_path / "out") == ["one", "twö", "three\n"]


@given(
    st.lists(st.text(alphabet="ab\n", max_size=30), min_size=1, max_size=8).filter(any),
    st.integers(1, 20),
    st.integers(1, 40),
)
def test_any_cut_gives_the_same_documents(tmp_path_factory, texts, batch_chars, shard_tokens):
    folder = tmp_path_factory.mktemp("cut")
    corpus = corpus_of(write_jsonl(folder / "rows.jsonl", texts), "jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "BATCH_CHARS", batch_chars)
        patch.setattr(shard_writer, "SHARD_TOKENS", shard_tokens)
        tokenise(corpus, Bytes(), folder / "out", progress=False)
    assert read_documents(folder / "out") == [text for text in texts if text]


def test_a_long_file_is_one_sequence(tmp_path, monkeypatch):
    monkeypatch.setattr("attnres_train.data.corpora.text.PASSAGE_CHARS", 50)
    folder = write_text(tmp_path / "in", 2)
    (folder / "empty.txt").write_text("")
    counts = tokenise(corpus_of(folder), Bytes(), tmp_path / "out", progress=False)
    files = [(folder / name).read_text() for name in ("000.txt", "001.txt")]
    assert read_documents(tmp_path / "out") == files
    assert (counts.documents, counts.empty_documents) == (2, 1)
    assert counts.characters == sum(map(len, files))
    (prefix,) = shard_prefixes(tmp_path / "out")
    stored = megatron_datasets("indexed_dataset").IndexedDataset(prefix)
    assert stored.sequence_lengths.tolist() == [len(file) + 1 for file in files]


def test_a_document_longer_than_a_length_can_be(tmp_path, monkeypatch):
    """Sequences of at most so many tokens, of one document."""
    monkeypatch.setattr(shard_writer, "SEQUENCE_TOKENS", 7)
    texts = ["a" * 20, "b" * 6, "c" * 7, "d"]
    corpus = corpus_of(write_jsonl(tmp_path / "rows.jsonl", texts), "jsonl")
    counts = tokenise(corpus, Bytes(), tmp_path / "out", progress=False)
    assert (counts.documents, counts.cut_documents) == (4, 2)
    assert read_documents(tmp_path / "out") == texts
    (prefix,) = shard_prefixes(tmp_path / "out")
    stored = megatron_datasets("indexed_dataset").IndexedDataset(prefix)
    assert stored.sequence_lengths.tolist() == [7, 7, 7, 7, 7, 1, 2]
    assert stored.document_indices.tolist() == [0, 3, 4, 6, 7]
    assert len(text_hashes([prefix])) == 4


@pytest.mark.parametrize(("vocab_size", "dtype"), [(4096, "uint16"), (163_840, "int32")])
def test_ids_take_two_bytes_where_they_fit(tmp_path, vocab_size, dtype):
    writer = ShardWriter(tmp_path, vocab_size, eod=vocab_size - 1)
    writer.add([1, 2], ends_document=True, text="ab")
    writer.close()
    data = megatron_datasets("indexed_dataset").IndexedDataset(str(tmp_path / "00000"))
    assert data[0].dtype == dtype
    assert data[0].tolist() == [1, 2, vocab_size - 1]


def test_files_are_grouped_into_parts(monkeypatch):
    monkeypatch.setattr(shards, "PART_BYTES", 10)
    sized = [(Path(name), size) for name, size in zip("abcdef", (4, 6, 30, 1, 2, 3), strict=True)]
    groups = group_files(sized)
    assert ["".join(map(str, group)) for group in groups] == ["ab", "c", "def"]
    monkeypatch.setattr(shards, "MAX_PARTS", 2)
    many = group_files([(Path(str(i)), 100) for i in range(20)])
    assert [len(group) for group in many] == [10, 10]


@pytest.fixture
def three_parts(tmp_path, monkeypatch):
    """A corpus of three files, each a part of its own."""
    monkeypatch.setattr(shards, "PART_BYTES", 1)
    return corpus_of(write_text(tmp_path / "in", 3))


def test_an_interrupted_run_keeps_its_finished_parts(three_parts, tmp_path):
    out = tmp_path / "out"
    tokenise(three_parts, Bytes(), tmp_path / "whole", progress=False)

    last_line = three_parts.files[1].read_text().splitlines()[-1]
    with pytest.raises(KeyboardInterrupt):
        tokenise(three_parts, Bytes(fail_at=last_line), out, progress=False)
    assert sorted(part.name for part in out.iterdir()) == ["part_00000", "part_00001.partial"]
    assert len(shard_prefixes(out)) == 1, "an unfinished part is not read"

    tokenizer = Bytes()
    counts = tokenise(three_parts, tokenizer, out, progress=False)
    assert len(tokenizer.batch_chars) == 2, "only the two missing parts are tokenised"
    assert read_documents(out) == read_documents(tmp_path / "whole")
    assert counts.documents == 3
    assert tokenise(three_parts, Bytes(fail_at=""), out, progress=False) == counts


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".hashes"])
def test_a_damaged_part_is_made_again(three_parts, tmp_path, suffix):
    out = tmp_path / "out"
    tokenise(three_parts, Bytes(), out, progress=False)
    before = read_documents(out)
    file = out / "part_00001" / f"00000{suffix}"
    file.write_bytes(file.read_bytes()[:-1])
    assert [is_whole(part) for part in sorted(out.iterdir())] == [True, False, True]
    tokenizer = Bytes()
    tokenise(three_parts, tokenizer, out, progress=False)
    assert len(tokenizer.batch_chars) == 1
    assert read_documents(out) == before


def test_an_empty_corpus(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "in" / name).write_text("")
    with pytest.raises(
        UserError, match=r"data\.corpus\.0 \(text .*\) is empty: no text in 2 files"
    ):
        tokenise(corpus_of(tmp_path / "in"), Bytes(), tmp_path / "out", progress=False)


def test_batches_take_no_more_than_they_give():
    taken = []

    def endless():
        for number in itertools.count():
            taken.append(number)
            yield Passage("x" * 1000, True, 1000)

    stream = batches(endless())
    for wanted in range(1, 4):
        batch = next(stream)
        assert sum(len(passage.text) + 1 for passage in batch) >= shards.BATCH_CHARS
        assert len(taken) == wanted * len(batch)


def test_empty_documents_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(shards, "BATCH_CHARS", 10)
    empty = itertools.repeat(Passage("", True, 3), 25)
    assert [len(batch) for batch in batches(empty)] == [10, 10, 5]


@pytest.mark.parametrize("kind", ["jsonl", "text"])
def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch, kind):
    """4,000 documents, and one of as many lines."""
    monkeypatch.setattr(shards, "BATCH_CHARS", 1 << 14)
    monkeypatch.setattr(shard_writer, "SHARD_TOKENS", 1 << 16)
    monkeypatch.setattr("attnres_train.data.corpora.text.PASSAGE_CHARS", 1 << 12)
    file = tmp_path / f"rows.{kind}"
    line = json.dumps({"text": "x" * 999}) if kind == "jsonl" else "x" * 998
    file.write_text(f"{line}\n" * 4000)
    tokenizer = Bytes()
    tracemalloc.start()
    counts = tokenise(corpus_of(file, kind), tokenizer, tmp_path / "out", progress=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert counts.tokens == (4_000_000 if kind == "jsonl" else 3_996_001)
    assert max(tokenizer.batch_chars) <= (1 << 14) + (1 << 13)
    assert peak < 2_000_000, "less than half of the text, though every id was a Python object"
