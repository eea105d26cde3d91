from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from attnres_train.data.indexed import HEADER, TokenSequences, check_indexed
from attnres_train.data.megatron import megatron_datasets
from attnres_train.errors import UserError
from tests.data.tiny import write_indexed

SEQUENCES = [[5, 6, 7], [8], [9, 10, 11, 12]]


@pytest.fixture
def prefix(tmp_path):
    return write_indexed(tmp_path / "some.tokens_text_document", SEQUENCES)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_sequences_of_several_files(tmp_path, dtype):
    prefixes = [
        write_indexed(tmp_path / "a", SEQUENCES, dtype),
        write_indexed(tmp_path / "b", [[1, 2]], dtype),
    ]
    data = TokenSequences(prefixes)
    assert data.sequence_lengths.tolist() == [3, 1, 4, 2]
    assert data.sequence_lengths.dtype == np.int32
    assert [data.get(i).tolist() for i in range(4)] == [*SEQUENCES, [1, 2]]
    assert [data.length(i) for i in range(4)] == [3, 1, 4, 2]
    assert data.get(2, 1, 2).tolist() == [10, 11]
    assert data.get(2, 1).tolist() == [10, 11, 12]
    assert data.get(3, offset=1).tolist() == [2]


def test_megatrons_own_writer_is_read(tmp_path):
    """The calls of Megatron's preprocess_data: one `add_document` per document, int32 or uint16."""
    indexed_dataset = megatron_datasets("indexed_dataset")
    prefix = str(tmp_path / "megatron")
    for vocab_size, dtype in ((1000, np.uint16), (100_000, np.int32)):
        chosen = indexed_dataset.DType.optimal_dtype(vocab_size)
        assert chosen is dtype
        builder = indexed_dataset.IndexedDatasetBuilder(prefix + ".bin", chosen)
        for sequence in SEQUENCES:
            builder.add_document(sequence, [len(sequence)])
        builder.finalize(prefix + ".idx")
        size = check_indexed(prefix)
        assert (size.num_sequences, size.num_tokens) == (3, 8)
        assert TokenSequences([prefix]).get(2).tolist() == SEQUENCES[2]


def test_size_is_read_without_tokens(prefix):
    size = check_indexed(prefix)
    assert (size.num_sequences, size.num_tokens) == (3, 8)


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
@pytest.mark.parametrize("lost", [1, 9, 10_000])
def test_truncated_files_name_themselves_and_their_bytes(prefix, suffix, lost):
    file = Path(prefix + suffix)
    content = file.read_bytes()
    file.write_bytes(content[:-lost])
    found = max(0, len(content) - lost)
    expected = len(content) if found >= HEADER.size or suffix == ".bin" else HEADER.size
    with pytest.raises(UserError) as caught:
        check_indexed(prefix)
    assert str(caught.value) == (
        f"{file} is truncated: expected {expected} bytes, found {found}; copy or make it again"
    )
    with pytest.raises(UserError, match="is truncated"):
        TokenSequences([prefix])


def test_missing_and_foreign_files(prefix, tmp_path):
    with pytest.raises(UserError, match=rf"there is no file {tmp_path}/absent\.idx"):
        check_indexed(str(tmp_path / "absent"))
    floats = write_indexed(tmp_path / "floats", [[1, 2]], np.float32)
    with pytest.raises(UserError, match=r"floats\.bin holds no integers \(dtype code 7\)"):
        check_indexed(floats)
    index = Path(prefix + ".idx")
    index.write_bytes(b"X" + index.read_bytes()[1:])
    with pytest.raises(UserError, match=r"\.idx is no index of Megatron tokens"):
        check_indexed(prefix)


def test_an_index_of_nothing(tmp_path):
    assert check_indexed(write_indexed(tmp_path / "empty", [])).num_tokens == 0
