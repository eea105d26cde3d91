"""Writes documents of tokens as Megatron's .bin/.idx pairs, in bounded memory however long one is,
and beside each pair the hashes of its documents."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from attnres_train.data.document_hashes import SUFFIX, TextHash
from attnres_train.data.indexed import write_index
from attnres_train.errors import UserError

# Tokens of a shard, at least: what bounds the index that its writer holds in memory.
SHARD_TOKENS = 1 << 28
# Lengths in an index are int32: of a longer document, each so many tokens are a sequence.
SEQUENCE_TOKENS = 2**31 - 1
# As in megatron-core (datasets/indexed_dataset.py, `DType.optimal_dtype`): more ids take 4 bytes.
MOST_IDS_OF_2_BYTES = 65_499


@dataclass
class Counts:
    """What a part holds. ``empty_documents`` were skipped."""

    documents: int = 0
    empty_documents: int = 0
    cut_documents: int = 0
    """Longer than SEQUENCE_TOKENS."""
    tokens: int = 0
    characters: int = 0
    text_bytes: int = 0
    """Of the texts, in UTF-8; 0 where some were tokenised before they were counted."""
    dropped_characters: int = 0
    """Those that had no token."""
    unknown_tokens: int = 0
    """Tokens that stand for text which has no other."""


class ShardWriter:
    """Writes documents to ``00000.bin/.idx/.hashes``, ``00001...`` in ``folder``: a new shard at
    the first document after every SHARD_TOKENS tokens. A document is one sequence, and more only
    beyond SEQUENCE_TOKENS. Ids are uint16 where the vocabulary fits, as in Megatron's own files,
    else int32.
    """

    def __init__(self, folder: Path, vocab_size: int, eod: int, unknown: int | None = None) -> None:
        """``unknown``: id of the token that is counted as unknown."""
        self.folder = folder
        self.vocab_size, self.eod, self.unknown = vocab_size, eod, unknown
        self.dtype: type[np.integer] = np.uint16 if vocab_size <= MOST_IDS_OF_2_BYTES else np.int32
        self.counts = Counts()
        self._num_shards = 0
        self._bin: IO[bytes] | None = None
        self._hash = TextHash()
        self._document_tokens = 0
        self._begin_index()

    def add(self, ids: list[int], ends_document: bool, text: str) -> None:
        """Append a document, ``text`` of the tokens ``ids``, or the next part of one. Documents
        without tokens are left out.

        Raises UserError for ids outside the vocabulary.
        """
        self.counts.characters += len(text)
        self.counts.text_bytes += self._hash.update(text)
        if ids:
            self._write(ids)
        if ends_document:
            self._end_document()

    def close(self) -> None:
        """Write the index of the open shard."""
        if self._bin is None:
            return
        self._bin.close()
        prefix = self._prefix()
        lengths = np.frombuffer(self._lengths, np.int32)
        write_index(prefix, self.dtype, lengths, np.frombuffer(self._marks, np.int64))
        hashes = np.frombuffer(self._hashes, np.uint64)
        hashes.astype("<u8").tofile(f"{prefix}{SUFFIX}")
        self._bin = None
        self._num_shards += 1
        self._begin_index()

    def _begin_index(self) -> None:
        self._lengths, self._marks, self._hashes = array("i"), array("q", [0]), array("Q")
        self._shard_tokens = 0

    def _end_document(self) -> None:
        value = self._hash.take()
        if not self._document_tokens:
            self.counts.empty_documents += 1
            return
        self._write([self.eod])
        self._marks.append(len(self._lengths))
        self._hashes.append(value)
        self._document_tokens = 0
        self.counts.documents += 1
        if self._shard_tokens >= SHARD_TOKENS:
            self.close()

    def _write(self, ids: list[int]) -> None:
        """Append to the open document."""
        tokens = np.array(ids, np.int64)
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.vocab_size:
            # Stored in two bytes, it would become another token.
            raise UserError(
                f"data.tokenizer gave the token id {low if low < 0 else high}, but its vocabulary "
                f"has the ids 0 to {self.vocab_size - 1}"
            )
        if self.unknown is not None:
            self.counts.unknown_tokens += int(np.count_nonzero(tokens == self.unknown))
        if self._bin is None:
            self._bin = open(f"{self._prefix()}.bin", "wb")  # noqa: SIM115 - closed in `close`
        self._bin.write(tokens.astype(self.dtype).tobytes())
        self._lengthen(len(ids))

    def _lengthen(self, count: int) -> None:
        """``count`` tokens more in the open document."""
        left = count
        while left:
            filled = self._document_tokens % SEQUENCE_TOKENS
            if not filled:
                self._lengths.append(0)
                self.counts.cut_documents += self._document_tokens == SEQUENCE_TOKENS
            taken = min(left, SEQUENCE_TOKENS - filled)
            self._lengths[-1] += taken
            self._document_tokens += taken
            left -= taken
        self._shard_tokens += count
        self.counts.tokens += count

    def _prefix(self) -> Path:
        return self.folder / f"{self._num_shards:05d}"
