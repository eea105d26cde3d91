"""Megatron's token files: a .bin of token ids, an .idx with length and place of each sequence.

Layout of an .idx, little-endian: magic (9 bytes), version (u64), dtype code (u8), number of
sequences n (u64), number of document marks d (u64); then lengths int32 [n], byte offsets int64 [n],
and the sequences at which documents begin, int64 [d], the last of which is n.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from attnres_train.data.held_out import Cut
from attnres_train.errors import UserError

HEADER = struct.Struct("<9sQBQQ")
MAGIC = b"MMIDIDX\x00\x00"
# Megatron's codes of the integer types; the other codes are floating point.
TOKEN_TYPES: dict[int, type[np.integer]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}

# Shards that are mapped at a time, two files each; a shell allows a process 1024 open files.
MAX_OPEN_SHARDS = 128


@dataclass(frozen=True)
class IndexedSize:
    num_sequences: int
    num_tokens: int


class Header(NamedTuple):
    """What an .idx says of itself."""

    token_type: type[np.integer]
    num_sequences: int
    num_documents: int

    @property
    def token_bytes(self) -> int:
        return np.dtype(self.token_type).itemsize

    @property
    def offsets_at(self) -> int:
        """The byte at which the offsets begin, after the lengths."""
        return HEADER.size + 4 * self.num_sequences


def read_header(prefix: str) -> Header:
    """That of ``prefix``.idx.

    Raises UserError where this or ``prefix``.bin is not there, or is none, or is too short for what
    it says.
    """
    idx, bin_ = Path(prefix + ".idx"), Path(prefix + ".bin")
    for file in (idx, bin_):
        if not file.is_file():
            raise UserError(f"there is no file {file}")
    _expect(idx, at_least=HEADER.size)
    with open(idx, "rb") as stream:
        magic, version, code, n, d = HEADER.unpack(stream.read(HEADER.size))
    if magic != MAGIC or version != 1:
        raise UserError(f"{idx} is no index of Megatron tokens (.idx, version 1)")
    if code not in TOKEN_TYPES:
        raise UserError(f"{idx} says that {bin_} holds no integers (dtype code {code})")
    _expect(idx, at_least=HEADER.size + 12 * n + 8 * d)
    return Header(TOKEN_TYPES[code], n, d)


def check_indexed(prefix: str) -> IndexedSize:
    """Check that ``prefix``.idx and ``prefix``.bin are whole and belong together, by their sizes
    and the places of all sequences, and return what they hold. Reads the index only, and without
    megatron-core.

    Raises UserError naming the file, the bytes expected and found, or the sequence.
    """
    header = read_header(prefix)
    idx, bin_ = Path(prefix + ".idx"), Path(prefix + ".bin")
    n, token_bytes = header.num_sequences, header.token_bytes
    if n == 0:
        _expect_no_more(idx, bin_, 0)
        return IndexedSize(0, 0)
    lengths = np.memmap(idx, np.int32, "r", HEADER.size, (n,))
    offsets = np.memmap(idx, np.int64, "r", header.offsets_at, (n,))
    for name, values in (("length", lengths), ("offset", offsets)):
        if values.min() < 0:
            place = int(np.argmax(values < 0))
            raise UserError(
                f"{idx} is damaged: sequence {place} has the {name} {values[place]}; make it again"
            )
    num_tokens = int(lengths.sum(dtype=np.int64))
    _expect(bin_, at_least=int((offsets + lengths.astype(np.int64) * token_bytes).max()))
    _expect(bin_, at_least=num_tokens * token_bytes)
    _expect_no_more(idx, bin_, num_tokens * token_bytes)
    _expect_apart(idx, lengths, offsets, token_bytes)
    return IndexedSize(n, num_tokens)


def num_sequences(prefix: str) -> int:
    """How many sequences ``prefix``.idx has. ``prefix`` has passed `check_indexed` before, maybe in
    another process: the index is not read, only whether both files are still of its size.

    Raises UserError where they are not.
    """
    header = read_header(prefix)
    n, token_bytes = header.num_sequences, header.token_bytes
    if n:
        with open(f"{prefix}.idx", "rb") as stream:
            stream.seek(header.offsets_at - 4)
            (length,) = struct.unpack("<i", stream.read(4))
            stream.seek(header.offsets_at + 8 * (n - 1))
            (offset,) = struct.unpack("<q", stream.read(8))
        _expect(Path(prefix + ".bin"), at_least=offset + length * token_bytes)
    return n


def _expect(file: Path, at_least: int) -> None:
    found = file.stat().st_size
    if found < at_least:
        raise UserError(
            f"{file} is truncated: expected {at_least} bytes, found {found}; copy or make it again"
        )


def _expect_no_more(idx: Path, bin_: Path, expected: int) -> None:
    """Megatron writes exactly the tokens that the index has: more are those of another index."""
    found = bin_.stat().st_size
    if found > expected:
        raise UserError(
            f"{bin_} has {found} bytes, but the sequences of {idx} have {expected}: the two files "
            "do not belong together; copy or make both again"
        )


def _expect_apart(idx: Path, lengths: np.ndarray, offsets: np.ndarray, token_bytes: int) -> None:
    """Every sequence has a place of its own: in a .bin of their common size, none overlaps."""
    ends = offsets + lengths.astype(np.int64) * token_bytes
    if offsets[0] == 0 and np.array_equal(offsets[1:], ends[:-1]):
        return  # as Megatron writes them; others may have put them into another order
    order = np.lexsort((ends, offsets))
    wrong = offsets[order][1:] < ends[order][:-1]
    if wrong.any():
        place = int(order[1:][np.argmax(wrong)])
        raise UserError(
            f"{idx} is damaged: sequence {place}, at byte {offsets[place]}, begins within another; "
            "make it again"
        )


def token_type(prefix: str) -> type[np.integer]:
    """The type of the token ids in ``prefix``.bin, which `check_indexed` has found good."""
    return read_header(prefix).token_type


def document_starts(prefix: str) -> np.ndarray:
    """The sequences of ``prefix`` at which documents begin, int64, ascending, 0 the first of them:
    every document has a sequence at least. ``prefix`` has passed `check_indexed`.

    Raises UserError where the index names sequences that it does not have.
    """
    _, n, d = read_header(prefix)
    marks = np.fromfile(f"{prefix}.idx", np.int64, d, offset=HEADER.size + 12 * n)
    wrong = (marks < 0) | (marks > n)
    if wrong.any():
        raise UserError(
            f"{prefix}.idx is damaged: document {int(np.argmax(wrong))} begins at sequence "
            f"{marks[wrong][0]} of {n}; make it again"
        )
    starts = np.unique(np.append(marks, 0))  # an end is a beginning, of nothing
    return starts[starts < n]


def write_index(
    prefix: Path, dtype: type[np.integer], lengths: np.ndarray, marks: np.ndarray
) -> None:
    """Write ``prefix``.idx for a .bin of sequences one after another; ``lengths`` int32 in tokens,
    ``marks`` int64: the sequences at which documents begin, and their number."""
    code = {found: code for code, found in TOKEN_TYPES.items()}[dtype]
    size = np.dtype(dtype).itemsize
    offsets = (np.cumsum(lengths, dtype=np.int64) - lengths) * size
    with open(f"{prefix}.idx", "wb") as stream:
        stream.write(HEADER.pack(MAGIC, 1, code, len(lengths), len(marks)))
        for values in (lengths.astype("<i4"), offsets.astype("<i8"), marks.astype("<i8")):
            stream.write(values.tobytes())


class Shard:
    """A .bin/.idx pair, mapped into memory: it takes two file descriptors while it lives."""

    def __init__(self, prefix: str) -> None:
        """``prefix`` has passed `check_indexed`, and holds a sequence at least."""
        header = read_header(prefix)
        index = np.memmap(prefix + ".idx", np.uint8, "r")
        at, n = header.offsets_at, header.num_sequences
        self._lengths = index[HEADER.size : at].view("<i4")
        self._offsets = index[at : at + 8 * n].view("<i8")
        self._tokens = np.memmap(prefix + ".bin", np.uint8, "r")
        self._dtype = np.dtype(header.token_type)

    def length(self, place: int) -> int:
        """Tokens of the sequence at ``place``."""
        return int(self._lengths[place])

    def get(self, place: int, offset: int, length: int) -> np.ndarray:
        """``length`` token ids of the sequence at ``place`` from ``offset``."""
        start = int(self._offsets[place]) + offset * self._dtype.itemsize
        # A copy: as long as there is a view, the file stays open.
        return np.frombuffer(self._tokens, self._dtype, length, start).copy()


OpenShard = Callable[[str], Shard]
"""Prefix -> the shard."""


def keep_open(most: int = MAX_OPEN_SHARDS) -> OpenShard:
    """Opens shards when they are asked for, and keeps the ``most`` that were asked for last: for
    all `TokenSequences` of a process together, so that any number of shards may be read."""
    return lru_cache(maxsize=most)(Shard)


class TokenSequences:
    """The sequences of several .bin/.idx pairs, one after another: what GPTDataset reads from.

    One of them may be ``cut``: its number then stands for its beginning, and the number after the
    last sequence's for the rest.
    """

    def __init__(
        self,
        prefixes: Sequence[str],
        open_shard: OpenShard | None = None,
        cut: Cut | None = None,
    ) -> None:
        """Raises UserError when a file is missing or truncated."""
        self.prefixes = list(prefixes)
        self.cut = cut
        self._open_shard = open_shard or keep_open()
        self._sizes = [num_sequences(prefix) for prefix in prefixes]
        self._starts = np.cumsum([0, *self._sizes])

    @cached_property
    def sequence_lengths(self) -> np.ndarray:
        """Tokens of each sequence, int32. Only building indices needs them."""
        lengths = [
            np.fromfile(prefix + ".idx", np.int32, count, offset=HEADER.size)
            for prefix, count in zip(self.prefixes, self._sizes, strict=True)
        ]
        if self.cut is None:
            return np.concatenate(lengths)
        found = np.concatenate([*lengths, np.zeros(1, np.int32)])
        found[-1] = found[self.cut.sequence] - self.cut.tokens
        found[self.cut.sequence] = self.cut.tokens
        return found

    @cached_property
    def document_starts(self) -> np.ndarray:
        """The sequences at which documents begin, int64, ascending. Only building indices needs
        them."""
        starts = zip(self._starts, self.prefixes, strict=False)
        return np.concatenate([first + document_starts(prefix) for first, prefix in starts])

    def get(self, index: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Token ids of sequence ``index`` from ``offset``: ``length`` of them, or all."""
        if length is None:
            length = self.length(index) - offset
        if self.cut and index == self._starts[-1]:
            index, offset = self.cut.sequence, offset + self.cut.tokens
        prefix, place = self._locate(index)
        return self._open_shard(prefix).get(place, offset, length)

    def length(self, index: int) -> int:
        """Tokens of sequence ``index``."""
        if self.cut and index == self.cut.sequence:
            return self.cut.tokens
        if self.cut and index == self._starts[-1]:
            prefix, place = self._locate(self.cut.sequence)
            return self._open_shard(prefix).length(place) - self.cut.tokens
        prefix, place = self._locate(index)
        return self._open_shard(prefix).length(place)

    def _locate(self, index: int) -> tuple[str, int]:
        """The prefix of the file of sequence ``index``, and its place there."""
        file = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.prefixes[file], int(index - self._starts[file])
