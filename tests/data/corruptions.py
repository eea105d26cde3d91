"""Datasets that are damaged, or not what they are named."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attnres_train.data.indexed import HEADER
from tests.data.tiny import sentence

Corrupt = Callable[[Path], None]
ROWS = [f"{number} {sentence(number, 40)}" for number in range(40)]
JSONL = "".join(json.dumps({"text": row}) + "\n" for row in ROWS).encode()
TEXT = "".join(row + "\n" for row in ROWS).encode()
SEQUENCES = [[5, 6, 7] * 20, [8], [9, 10] * 30]
CASES: dict[str, tuple[str, str, Corrupt, list[str]]] = {}
"""Name -> kind of corpus, its file's name, what happens to it, what the error has to name."""


def case(kind: str, name: str, *told: str) -> Callable[[Corrupt], Corrupt]:
    def note(corrupt: Corrupt) -> Corrupt:
        CASES[corrupt.__name__] = (kind, name, corrupt, list(told))
        return corrupt

    return note


def insert(file: Path, line: int, content: bytes) -> None:
    """Put ``content`` in place of line ``line`` (from 1)."""
    lines = file.read_bytes().splitlines(keepends=True)
    lines[line - 1] = content + b"\n"
    file.write_bytes(b"".join(lines))


def flip(file: Path, place: int, by: int = 0xFF) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= by
    file.write_bytes(content)


# Text


@case("text", "a.txt", "line 3", "byte", "0xe9")
def text_in_latin_1(file: Path) -> None:
    insert(file, 3, "fiancé e".encode("latin-1"))


@case("text", "a.txt", "UTF-16", "byte 0")
def text_in_utf_16_with_a_mark(file: Path) -> None:
    file.write_bytes(TEXT.decode().encode("utf-16"))


@case("text", "a.txt", "UTF-16", "byte 1")
def text_in_utf_16_without_a_mark(file: Path) -> None:
    file.write_bytes(TEXT.decode().encode("utf-16-le"))


@case("text", "a.txt", "UTF-32", "byte 0")
def text_in_utf_32(file: Path) -> None:
    file.write_bytes(TEXT.decode().encode("utf-32"))


@case("text", "a.txt", "line 41", f"byte {len(TEXT)}")
def text_cut_within_a_character(file: Path) -> None:
    file.write_bytes(TEXT + "é".encode()[:1])


@case("text", "a.txt", "not UTF-8 text", "line 1")
def text_that_is_compressed(file: Path) -> None:
    file.write_bytes(gzip.compress(TEXT))


@case("text", "a.txt", "empty", "data.corpus.0")
def text_of_nothing(file: Path) -> None:
    file.write_bytes(b"")


# JSONL


@case("jsonl", "a.jsonl", "line 4", "not valid JSON")
def jsonl_line_cut_short(file: Path) -> None:
    insert(file, 4, b'{"text": "half')


@case("jsonl", "a.jsonl", "line 2", "byte", "0xe9")
def jsonl_in_latin_1(file: Path) -> None:
    insert(file, 2, '{"text": "é"}'.encode("latin-1"))


@case("jsonl", "a.jsonl", "UTF-16", "byte 0")
def jsonl_in_utf_16(file: Path) -> None:
    file.write_bytes(JSONL.decode().encode("utf-16"))


@case("jsonl", "a.jsonl", "line 5", "no field", "title")
def jsonl_without_the_field(file: Path) -> None:
    insert(file, 5, b'{"title": "x"}')


@case("jsonl", "a.jsonl", "line 6", "list, not text")
def jsonl_with_another_type(file: Path) -> None:
    insert(file, 6, b'{"text": ["x"]}')


@case("jsonl", "a.jsonl", "line 1", "not a JSON object")
def jsonl_that_is_one_json_array(file: Path) -> None:
    file.write_text(json.dumps([{"text": row} for row in ROWS]))


@case("jsonl", "a.jsonl", "line 7", "not valid JSON")
def jsonl_nested_without_end(file: Path) -> None:
    insert(file, 7, b'{"text": ' + b"[" * 100_000)


@case("jsonl", "a.jsonl", "line 3", "not valid JSON")
def jsonl_with_a_hole_of_zeros(file: Path) -> None:
    insert(file, 3, b"\0" * 64)


@case("jsonl", "a.jsonl.gz", "damaged or truncated after line")
def gzip_cut_short(file: Path) -> None:
    file.write_bytes(gzip.compress(JSONL)[:-100])


@case("jsonl", "a.jsonl.gz", "damaged or truncated after line")
def gzip_with_a_flipped_byte(file: Path) -> None:
    file.write_bytes(gzip.compress(JSONL, 0))
    flip(file, file.read_bytes().index(ROWS[20].encode()) + 5, 1)


@case("jsonl", "a.jsonl.gz", "no gzip file", "byte 0")
def gzip_by_name_alone(file: Path) -> None:
    file.write_bytes(JSONL)


@case("jsonl", "a.jsonl.bz2", "damaged or truncated after line")
def bzip2_cut_short(file: Path) -> None:
    file.write_bytes(bz2.compress(JSONL)[:-100])


@case("jsonl", "a.jsonl.xz", "damaged or truncated after line")
def xz_with_a_flipped_byte(file: Path) -> None:
    file.write_bytes(lzma.compress(JSONL))
    flip(file, 200)


@case("jsonl", "a.jsonl.zst", "damaged or truncated after line")
def zstd_cut_short(file: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    file.write_bytes(pyarrow.Codec("zstd").compress(JSONL, asbytes=True)[:-50])


# Parquet


def write_parquet(file: Path, values: Any = ROWS, **how: Any) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": values}), file, **how)


@case("parquet", "a.parquet", "row 3", "not UTF-8 text", "byte 1")
def parquet_text_that_is_no_utf_8(file: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    raw = pyarrow.array([b"one", b"two", b"a\xff", b"four"] * 20, pyarrow.binary())
    # As pyarrow itself lets pass: https://github.com/apache/arrow/issues/29635.
    text = pyarrow.Array.from_buffers(pyarrow.string(), len(raw), raw.buffers())
    write_parquet(file, text)


@case("parquet", "a.parquet", "is not a Parquet file")
def parquet_cut_short(file: Path) -> None:
    write_parquet(file)
    file.write_bytes(file.read_bytes()[:-40])


@case("parquet", "a.parquet", "is damaged after row 0")
def parquet_page_that_is_damaged(file: Path) -> None:
    write_parquet(file, compression="snappy")
    content = file.read_bytes()
    file.write_bytes(content[:60] + b"\xff" * 100 + content[160:])


@case("parquet", "a.parquet", "is damaged after row 0", "checksum")
def parquet_page_whose_checksum_differs(file: Path) -> None:
    write_parquet(file, compression="none", use_dictionary=False, write_page_checksum=True)
    flip(file, file.read_bytes().index(ROWS[20].encode()), 1)


@case("parquet", "a.parquet", "row 1", "int, not text")
def parquet_of_numbers(file: Path) -> None:
    write_parquet(file, list(range(40)))


@case("parquet", "a.parquet", "is not a Parquet file")
def parquet_that_is_jsonl(file: Path) -> None:
    file.write_bytes(JSONL)


# Megatron's pairs: the file that is corrupted is the .idx


def patch(file: Path, place: int, form: str, value: int) -> None:
    content = bytearray(file.read_bytes())
    struct.pack_into(form, content, place, value)
    file.write_bytes(content)


LENGTHS = HEADER.size
OFFSETS = LENGTHS + 4 * len(SEQUENCES)


@case("indexed", "a.idx", "sequence 1", "length -1")
def index_with_a_negative_length(file: Path) -> None:
    patch(file, LENGTHS + 4, "<i", -1)


@case("indexed", "a.idx", "sequence 2", "offset -4")
def index_with_a_negative_offset(file: Path) -> None:
    patch(file, OFFSETS + 16, "<q", -4)


@case("indexed", "a.idx", "sequence 1", "at byte 6", "begins within another")
def index_whose_sequences_overlap(file: Path) -> None:
    patch(file, OFFSETS + 8, "<q", 6)


@case("indexed", "a.bin", "484 bytes", "a.idx have 242")
def index_of_an_older_narrower_bin(file: Path) -> None:
    tokens = np.concatenate(SEQUENCES).astype(np.int32)
    file.with_suffix(".bin").write_bytes(tokens.tobytes())


@case("indexed", "a.bin", "is truncated", "expected 242 bytes, found 240")
def bin_cut_short(file: Path) -> None:
    bin_ = file.with_suffix(".bin")
    bin_.write_bytes(bin_.read_bytes()[:-2])


@case("indexed", "a.idx", "is truncated")
def index_cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-30])


@case("indexed", "a.idx", "dtype code 9")
def index_with_an_unknown_type(file: Path) -> None:
    patch(file, 17, "<B", 9)


@case("indexed", "a.idx", "is truncated")
def index_that_counts_wildly(file: Path) -> None:
    patch(file, 18, "<Q", 1 << 50)


@case("indexed", "a.idx", "document 1 begins at sequence 99 of")
def index_whose_documents_begin_beyond_its_end(file: Path) -> None:
    patch(file, OFFSETS + 8 * len(SEQUENCES) + 8, "<q", 99)


@case("indexed", "a.bin", "token id 600", "token 60, in sequence 1", "model.vocab_size")
def id_outside_the_vocabulary_in_a_document_that_may_be_held_out(file: Path) -> None:
    patch(file.with_suffix(".bin"), 2 * 60, "<H", 600)
