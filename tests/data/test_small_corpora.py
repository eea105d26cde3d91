"""Corpora of which the documents held out make no sample."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnres_train.data.held_out import Cut, part
from attnres_train.data.indexed import TokenSequences
from attnres_train.data.loader import open_data
from attnres_train.data.prepare import prepare
from attnres_train.errors import UserError
from tests.data.test_held_out import TEXTS, indexed, of_text, sides
from tests.data.tiny import run_config, sentence, write_indexed, write_jsonl


class TestParts:
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

    def test_documents_that_make_no_sample_do_not_change_sides_for_it(self):
        """Of a corpus without validation: it may grow."""
        found = self.parted([20, 5], held=[1])
        assert (found.train.tolist(), found.valid.tolist(), found.held_out) == ([0], [], 1)
        found = self.parted([16, 5], held=[1])
        assert (found.train.tolist(), found.valid.tolist(), found.held_out) == ([0, 1], [], 0)

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
        assert counts[1] == 0 or min(counts) >= 17
        if counts[1] or not found.held_out:
            assert sum(counts) == lengths.sum()
        else:  # on no side
            assert counts[0] == lengths[hashes >= np.uint64(int(share * 2**64))].sum()

    def test_a_cut_sequence_reads_as_two(self, tmp_path):
        prefixes = [write_indexed(tmp_path / name, [[1, 2, 3], [4, 5, 6, 7]]) for name in "ab"]
        data = TokenSequences(prefixes, cut=Cut(3, 1))
        assert data.sequence_lengths.tolist() == [3, 4, 3, 1, 3]
        assert [data.length(i) for i in range(5)] == [3, 4, 3, 1, 3]
        assert data.get(3).tolist() == [4] and data.get(4).tolist() == [5, 6, 7]
        assert data.get(4, 1).tolist() == [6, 7] and data.get(4, 1, 1).tolist() == [6]
        assert data.get(3, 0, 1).tolist() == [4] and data.get(1, 2).tolist() == [6, 7]


class TestWhatIsTold:
    def test_of_each_corpus(self, tmp_path, capsys):
        rows = {"kind": "jsonl", "path": str(write_jsonl(tmp_path / "rows.jsonl", TEXTS))}
        one = {"kind": "jsonl", "path": str(write_jsonl(tmp_path / "one.jsonl", ["words " * 99]))}
        short = write_jsonl(tmp_path / "few.jsonl", ["a few words " * 3])
        few = {"kind": "jsonl", "path": str(short)}
        config = of_text(tmp_path / "cache", rows, one, few)
        prepared = prepare(config)
        told = capsys.readouterr().err
        valid = len(sides(of_text(tmp_path / "cache", rows))[0][1])
        assert f"data.corpus.0: {valid} of 60 documents held out (" in told
        assert "data.corpus.1: 0 of 1 documents held out, too few for a sample: so are" in told
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
            f"and lend one to validation, and data.corpus.0 (indexed {prefix}) has 30 "
            "training tokens in 1 documents. Bring more text, lower train.seq_length, or set "
            "train.eval_interval to 0"
        )
        config = indexed(tmp_path / "cache", prefix)
        config.train.eval_interval = 0
        assert prepare(config, progress=False).num_tokens == 30
