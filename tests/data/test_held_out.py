"""Which documents are held out: by what they hold, and by nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnres_train.config.schema import RunConfig
from attnres_train.data import token_range
from attnres_train.data.document_hashes import TextHash
from attnres_train.data.held_out import is_held_out
from attnres_train.data.indexed import write_index
from attnres_train.data.loader import open_data
from attnres_train.data.prepare import open_tokenizer, prepare
from attnres_train.data.token_range import look_through
from attnres_train.errors import UserError
from tests.data.test_kinds import WORDS
from tests.data.tiny import run_config, sentence, text_corpus, write_indexed, write_jsonl

NONE = {"kind": "none"}
TEXTS = [sentence(number, 20) for number in range(60)]


def indexed(cache: Path, *paths: str, **changes) -> RunConfig:
    corpora = [{"kind": "indexed", "path": path} for path in paths]
    return run_config(cache, corpora, NONE, train__eval_interval=1, **changes)


def sides(config: RunConfig) -> list[tuple[set[str], set[str]]]:
    """The documents of each corpus that are trained on, and those that are held out, as text."""
    prepared = prepare(config, progress=False)
    tokenizer = open_tokenizer(config, prepared)
    data, found = open_data(config, prepared), []
    assert tokenizer is not None
    for number in range(len(prepared.sources)):
        both = []
        for samples in (data.train, data.valid):
            one = samples.datasets[number] if len(prepared.sources) > 1 else samples
            stored, index = one.dataset.dataset, one.dataset.document_index
            both.append({tokenizer.decode(stored.get(int(i))[:-1]) for i in index})
        found.append((both[0], both[1]))
    return found


def of_text(cache: Path, *corpora: dict, **changes) -> RunConfig:
    return run_config(cache, list(corpora), train__eval_interval=1, **changes)


@pytest.fixture
def rows(tmp_path) -> dict:
    return {"kind": "jsonl", "path": str(write_jsonl(tmp_path / "rows.jsonl", TEXTS))}


class TestByTheDocument:
    def test_a_corpus_that_grows_moves_none_across(self, tmp_path, rows):
        """(Megatron-Energon#52) One more of 100,000, and 1,779 of 2,000 held-out ones moved."""
        ((train, valid),) = sides(of_text(tmp_path / "cache", rows))
        assert len(train) + len(valid) == len(TEXTS) and 5 < len(valid) < 25
        for place in (0, 30, 60):
            grown = [*TEXTS[:place], "one more document, of its own words", *TEXTS[place:]]
            write_jsonl(Path(rows["path"]), grown)
            ((more_train, more_valid),) = sides(of_text(tmp_path / "cache", rows))
            assert more_train >= train and more_valid >= valid
            assert len(more_train) + len(more_valid) == len(TEXTS) + 1

    def test_nothing_else_counts(self, tmp_path, rows):
        """Files, their names and order, the tokenizer, the seed, the number of the corpus."""
        ((train, valid),) = sides(of_text(tmp_path / "cache", rows))
        folder = tmp_path / "others"
        folder.mkdir()
        write_jsonl(folder / "b.jsonl", TEXTS[:20][::-1])
        write_jsonl(folder / "a.jsonl", TEXTS[20:])
        other = {"kind": "jsonl", "path": str(folder), "text_field": "text"}
        first = {"kind": "jsonl", "path": str(write_jsonl(tmp_path / "c.jsonl", TEXTS[:40]))}
        config = of_text(tmp_path / "cache", first, other, run__seed=7)
        (one, two) = sides(config)
        assert two == (train, valid)
        assert one[0] <= train and one[1] <= valid and one[1]

        (tmp_path / "texts").mkdir()
        for number, text in enumerate(TEXTS):
            (tmp_path / "texts" / f"{number * 7 % 60:02d}.txt").write_text(text)
        words = {"kind": "file", "path": str(tmp_path / "words.json")}
        Path(words["path"]).write_text(WORDS)
        as_text = of_text(tmp_path / "cache", text_corpus(tmp_path / "texts"))
        as_text.data.tokenizer.vocab_size = 290
        assert sides(as_text) == [(train, valid)]

        by_words = run_config(tmp_path / "cache", [rows], words, train__eval_interval=1)
        prepared = prepare(by_words, progress=False)
        held_out = open_data(by_words, prepared).valid.dataset.document_index
        assert {TEXTS[number] for number in held_out} == valid

    def test_a_larger_share_holds_out_more_and_lets_none_go(self, tmp_path, rows):
        found = [
            sides(of_text(tmp_path / "cache", rows, data__split=(1 - share, share)))[0][1]
            for share in (0.1, 0.3, 0.9)
        ]
        assert found[0] < found[1] < found[2]

    def test_equal_documents_are_on_one_side(self, tmp_path):
        texts = [sentence(number, 20) for number in [*range(20), *range(20), 5, 5]]
        rows = {"kind": "jsonl", "path": str(write_jsonl(tmp_path / "rows.jsonl", texts))}
        ((train, valid),) = sides(of_text(tmp_path / "cache", rows))
        assert len(train) + len(valid) == 20 and valid

    def test_nothing_without_validation(self, tmp_path, rows):
        cache = tmp_path / "cache"
        everything = prepare(run_config(cache, [rows]), progress=False)
        validated = prepare(of_text(cache, rows), progress=False)
        assert everything.num_valid_tokens == 0 < validated.num_valid_tokens
        total = validated.num_tokens + validated.num_valid_tokens
        assert everything.num_tokens == total
        none_held_out = run_config(cache, [rows], data__split=(1.0, 0.0))
        assert prepare(none_held_out, progress=False) == everything


@given(st.lists(st.text(alphabet="ab\n𝄞é", max_size=5), max_size=6), st.booleans())
def test_a_text_has_one_hash_however_it_is_cut(parts, first):
    one, other = TextHash(), TextHash()
    if first:
        one.update("before")
        one.take()
    for text in parts:
        one.update(text)
    other.update("".join(parts))
    assert one.take() == other.take()


def test_shares_are_kept():
    hashes = np.random.default_rng(0).integers(0, 2**64, 100_000, np.uint64)
    for share in (0.0, 1e-3, 0.02, 0.5, 1.0):
        assert abs(is_held_out(hashes, share).mean() - share) < 5e-3


class TestOfTokens:
    """Of files of tokens."""

    @given(
        documents=st.lists(st.lists(st.integers(0, 3), max_size=9), min_size=1, max_size=9),
        at_once=st.integers(1, 12),
    )
    def test_equal_documents_have_equal_hashes(self, tmp_path_factory, documents, at_once):
        """However many are looked at together, and in whatever type and order they are stored."""
        folder = tmp_path_factory.mktemp("hashes")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(token_range, "AT_ONCE_TOKENS", at_once)
            prefix = write_indexed(folder / "a", documents)
            low, high, found = look_through(prefix, hashed=True)
        tokens = [token for document in documents for token in document] or [0]
        assert (low, high) == (min(tokens), max(tokens))
        turned = write_indexed(folder / "b", documents[::-1], np.int32)
        assert look_through(turned, hashed=True)[2].tolist() == found.tolist()[::-1]
        assert shuffled(folder / "c", documents) == found.tolist()
        distinct = {tuple(document) for document in documents}
        pairs = {(tuple(document), value) for document, value in zip(documents, found, strict=True)}
        assert len(pairs) == len(distinct) == len(set(found.tolist()))

    def test_they_are_spread_evenly(self, tmp_path):
        """As short and alike as they may be."""
        documents = [[a, b] for a in range(100) for b in range(50)]
        found = look_through(write_indexed(tmp_path / "a", documents), hashed=True)[2]
        counts = np.bincount((found >> np.uint64(60)).astype(int), minlength=16)
        assert len(set(found.tolist())) == 5000
        assert counts.min() > 5000 / 16 * 0.8 and counts.max() < 5000 / 16 * 1.2

    def test_documents_of_several_sequences_go_to_one_side(self, tmp_path):
        """60 documents of 1 to 4 sequences."""
        rng = np.random.default_rng(0)
        sequences, starts = [], []
        for number in range(60):
            starts.append(len(sequences))
            sequences += [[number] * int(rng.integers(3, 20)) for _ in range(number % 4 + 1)]
        prefix = with_documents(tmp_path / "a", sequences, starts)
        config = indexed(tmp_path / "cache", prefix)
        data = open_data(config, prepare(config, progress=False))
        seen = [
            {int(stored.get(int(i))[0]) for i in index}
            for stored, index in (
                (one.dataset.dataset, one.dataset.document_index)
                for one in (data.train, data.valid)
            )
        ]
        assert seen[0] | seen[1] == set(range(60))
        assert not seen[0] & seen[1] and len(seen[1]) > 5
        joined = [
            [token for sequence in sequences[first:after] for token in sequence]
            for first, after in zip(starts, [*starts[1:], None], strict=True)
        ]
        whole = indexed(tmp_path / "cache", write_indexed(tmp_path / "b", joined))
        index = open_data(whole, prepare(whole, progress=False)).valid.dataset.document_index
        assert set(index.tolist()) == seen[1], "the same documents, each one sequence"

    def test_marks_of_documents_that_are_not_there(self, tmp_path):
        prefix = with_documents(tmp_path / "a", [[1] * 20] * 3, [0, 7])
        with pytest.raises(UserError, match=r"a\.idx is damaged: document 1 begins at sequence 7"):
            prepare(indexed(tmp_path / "cache", prefix), progress=False)


def shuffled(prefix: Path, documents: list[list[int]]) -> list[int]:
    """The hashes of ``documents`` whose tokens lie in another order than the index has them."""
    order = np.random.default_rng(1).permutation(len(documents))
    write_indexed(prefix, [documents[i] for i in order])
    lengths = np.array([len(documents[i]) for i in order])
    places = np.argsort(order)
    offsets = 2 * (np.cumsum(lengths) - lengths)[places]
    content = Path(f"{prefix}.idx").read_bytes()
    n = len(documents)
    body = lengths[places].astype(np.int32).tobytes() + offsets.astype(np.int64).tobytes()
    Path(f"{prefix}.idx").write_bytes(content[:34] + body + content[34 + 12 * n :])
    return look_through(str(prefix), hashed=True)[2].tolist()


def with_documents(prefix: Path, sequences: list[list[int]], starts: Iterable[int]) -> str:
    """Token files of documents that begin at the sequences ``starts``."""
    write_indexed(prefix, sequences)
    lengths = np.array([len(sequence) for sequence in sequences], np.int32)
    marks = np.array([*starts, len(sequences)], np.int64)
    write_index(prefix, np.uint16, lengths, marks)
    return str(prefix)
