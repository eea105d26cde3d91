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
from attnres_train.data.held_out import Cut, is_held_out, part
from attnres_train.data.indexed import TokenSequences, write_index
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


class TestSmallCorpora:
    """Where the documents that are held out make no sample of 17 tokens. A hash below 2^62 is held
    out of these, by a share of 1/4."""

    HELD, KEPT = 1, 2**63

    def parted(self, sizes: list[int], held: Iterable[int] = (), share: float = 0.25):
        """Of documents of ``sizes``; those at ``held`` are held out by their hash."""
        held = set(held)
        hashes = [self.HELD + i if i in held else self.KEPT + i for i in range(len(sizes))]
        lengths = np.array(sizes, np.int32)
        return part(lengths, np.arange(len(sizes)), np.array(hashes, np.uint64), share, 17)

    @pytest.mark.parametrize(
        ("sizes", "held", "cut", "valid"),
        [
            ([100], [], Cut(0, 75), [1]),  # share x tokens
            ([60], [], Cut(0, 43), [1]),  # a sample
            ([100], [0], Cut(0, 75), [1]),  # (Megatron-LM#18) the only one is held out
            ([34], [], Cut(0, 17), [1]),
            ([50, 90, 28], [], Cut(1, 48), [3]),
            ([50, 10, 90], [1], Cut(2, 52), [1, 3]),  # one is held out, but too short
            ([17, 17], [], None, [0]),  # a whole one, of the lower hash
        ],
    )
    def test_the_longest_lends_its_end(self, sizes, held, cut, valid):
        found = self.parted(sizes, held)
        assert (found.cut, found.valid.tolist()) == (cut, valid)
        assert set(found.train) | set(found.valid) >= set(range(len(sizes)))
        assert not set(found.train) & set(found.valid)

    @pytest.mark.parametrize("sizes", [[33], [16], [16, 16], [17, 10], []])
    def test_nothing_is_lent_that_training_needs(self, sizes):
        for held in ([], [0]):
            found = self.parted(sizes, held)
            assert found.train.tolist() == list(range(len(sizes)))
            assert (found.valid.tolist(), found.cut, found.lent_tokens) == ([], None, 0)

    def test_no_more_is_lent_than_leaves_a_sample(self):
        found = self.parted([60], share=0.9)
        assert (found.cut, found.lent_tokens) == (Cut(0, 17), 43)

    def test_nothing_is_lent_of_a_document_that_is_there_twice(self):
        hashes = np.array([self.KEPT, self.KEPT, self.KEPT + 1], np.uint64)
        found = part(np.array([90, 90, 50], np.int32), np.arange(3), hashes, 0.25, 17)
        assert found.cut is None and found.valid.tolist() == [2]

    def test_the_end_of_several_sequences(self):
        """Of a document of 20 + 30 + 10 + 5 tokens, 24 are lent; another one is before it."""
        lengths, hashes = np.array([30, 20, 30, 10, 5], np.int32), np.array([2**63, 2**63 + 1])
        found = part(lengths, np.array([0, 1]), hashes.astype(np.uint64), 0.25, 17)
        assert found.lent_tokens == 24 and found.cut == Cut(2, 21)
        assert found.train.tolist() == [0, 1, 2]
        assert found.valid.tolist() == [3, 4, 5]

    @given(
        st.lists(st.tuples(st.integers(0, 60), st.integers(0, 2**64 - 1)), max_size=12),
        st.floats(0, 0.99),
    )
    def test_each_side_has_a_sample_or_nothing_is_held_out(self, documents, share):
        lengths = np.array([size for size, _ in documents], np.int32)
        hashes = np.array([value for _, value in documents], np.uint64)
        found = part(lengths, np.arange(len(documents)), hashes, share, 17)
        counts = [int(lengths[one[one < len(lengths)]].sum()) for one in (found.train, found.valid)]
        if found.cut:
            rest = int(lengths[found.cut.sequence]) - found.cut.tokens
            assert rest > 0 and found.cut.tokens > 0
            counts = [counts[0] - rest, counts[1] + rest]
        assert sum(counts) == lengths.sum()
        assert counts[1] == 0 or min(counts) >= 17

    def test_a_cut_sequence_reads_as_two(self, tmp_path):
        prefixes = [write_indexed(tmp_path / name, [[1, 2, 3], [4, 5, 6, 7]]) for name in "ab"]
        data = TokenSequences(prefixes, cut=Cut(3, 1))
        assert data.sequence_lengths.tolist() == [3, 4, 3, 1, 3]
        assert [data.length(i) for i in range(5)] == [3, 4, 3, 1, 3]
        assert data.get(3).tolist() == [4] and data.get(4).tolist() == [5, 6, 7]
        assert data.get(4, 1).tolist() == [6, 7] and data.get(4, 1, 1).tolist() == [6]
        assert data.get(3, 0, 1).tolist() == [4] and data.get(1, 2).tolist() == [6, 7]


class TestWhatIsTold:
    def test_of_each_corpus(self, tmp_path, rows, capsys):
        one = {"kind": "jsonl", "path": str(write_jsonl(tmp_path / "one.jsonl", ["words " * 99]))}
        short = write_jsonl(tmp_path / "few.jsonl", ["a few words " * 3])
        few = {"kind": "jsonl", "path": str(short)}
        config = of_text(tmp_path / "cache", rows, one, few)
        prepared = prepare(config)
        told = capsys.readouterr().err
        valid = len(sides(of_text(tmp_path / "cache", rows))[0][1])
        assert f"data.corpus.0: {valid} of 60 documents held out (" in told
        assert "data.corpus.1: 0 of 1 documents held out, which make no sample: so are" in told
        assert "data.corpus.2: left out of validation: too small to hold out a sample" in told
        assert [source.validates for source in prepared.sources] == [True, True, False]
        assert len(open_data(config, prepared).valid.datasets) == 2
        prepare(run_config(tmp_path / "cache", [rows, one, few]))
        assert "held out" not in capsys.readouterr().err

    def test_one_document_and_half_of_it(self, tmp_path):
        """(Megatron-LM#18) "Raise the second share" could not help."""
        for number in range(6):
            text = sentence(number, 80)
            path = write_jsonl(tmp_path / f"{number}.jsonl", [text])
            corpus = {"kind": "jsonl", "path": str(path)}
            config = of_text(tmp_path / "cache", corpus, data__split=(0.5, 0.5))
            prepared = prepare(config, progress=False)
            assert abs(prepared.num_tokens - prepared.num_valid_tokens) <= 1

    def test_no_corpus_is_left(self, tmp_path):
        prefix = write_indexed(tmp_path / "a", [[1] * 30])
        with pytest.raises(UserError) as caught:
            prepare(indexed(tmp_path / "cache", prefix), progress=False)
        assert str(caught.value) == (
            "train.eval_interval is 1, but no corpus is large enough to validate on: of one, the "
            "longest document must leave a sample of train.seq_length + 1 = 17 tokens to training "
            f"and lend one to validation, and data.corpus.0 (indexed {prefix}) has 30 tokens. "
            "Bring more text, lower train.seq_length, or set train.eval_interval to 0"
        )
        config = indexed(tmp_path / "cache", prefix)
        config.train.eval_interval = 0
        assert prepare(config, progress=False).num_tokens == 30
