"""What every token of a corpus is looked at for, once: the lowest and the highest id of every file,
so that an id without an embedding is told before step 1, be it in a document that is held out or in
the last of a large corpus; and the hash of every document."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from attnres_train.data.cache import write_json
from attnres_train.data.document_hashes import SUFFIX, TokenHashes
from attnres_train.data.indexed import HEADER, document_starts, token_type
from attnres_train.errors import UserError

# Their hashes take five times 8 bytes a token meanwhile: what a core has near at hand.
AT_ONCE_TOKENS = 1 << 16


def check_vocabulary(
    prefixes: Sequence[str], vocab_size: int, where: str, cache: Path, *, hashed: bool = True
) -> None:
    """Check that every token id in ``prefixes``' .bin files is in [0, ``vocab_size``), and leave
    the hashes of their documents for `token_hashes`, if they are to be ``hashed``.

    What was found is kept in the folder ``cache``: a shard that has not changed since (size and
    time) is not read again. Raises UserError that names ``where``, the file, and the first token
    outside.
    """
    known = _read(cache)
    ranges: dict[str, list[int]] = {}
    for number, prefix in enumerate(prefixes):
        stat = Path(f"{prefix}.bin").stat()
        seen = [stat.st_size, stat.st_mtime_ns]
        found, file = known.get(prefix, []), _hash_file(cache, number)
        size = [file.stat().st_size] if file.is_file() else [-1]
        if found[:2] != seen or (hashed and found[4:] != size):
            low, high, hashes = look_through(prefix, hashed=hashed)
            found = [*seen, low, high]
            if hashes is not None:
                cache.mkdir(parents=True, exist_ok=True)
                hashes.astype("<u8").tofile(file)
                found.append(hashes.nbytes)
        ranges[prefix] = found
    if ranges != known:
        write_json(cache / "ranges.json", ranges)
    for prefix, (_, _, low, high, *_) in ranges.items():
        if low < 0 or high >= vocab_size:
            raise UserError(
                f"{where} holds token id {low if low < 0 else high}, but model.vocab_size is "
                f"{vocab_size}: it was tokenised for another vocabulary ({prefix}.bin, "
                f"{_first_outside(prefix, vocab_size)})"
            )


def token_hashes(prefixes: Sequence[str], cache: Path) -> np.ndarray:
    """The hash of each document of tokens in ``prefixes``, uint64, as `check_vocabulary` has left
    it in ``cache``."""
    files = [_hash_file(cache, number) for number in range(len(prefixes))]
    return np.concatenate([np.fromfile(file, "<u8") for file in files])


def look_through(prefix: str, *, hashed: bool) -> tuple[int, int, np.ndarray | None]:
    """The lowest and the highest token id in ``prefix``.bin (0 and 0 where it has none), and the
    hash of each document, uint64, if they are to be ``hashed``."""
    lengths, offsets = _index(prefix)
    hashes, low, high = None, None, None
    if hashed:
        starts = document_starts(prefix)
        sizes = np.add.reduceat(lengths, starts, dtype=np.int64) if len(starts) else lengths
        hashes = TokenHashes(sizes, AT_ONCE_TOKENS)
    for first, ids in _in_order(prefix, lengths, offsets):
        low = int(ids.min()) if low is None else min(low, int(ids.min()))
        high = int(ids.max()) if high is None else max(high, int(ids.max()))
        if hashes:
            hashes.add(first, ids)
    return (low or 0, high or 0, hashes.take() if hashes else None)


def _first_outside(prefix: str, vocab_size: int) -> str:
    """Where the first id stands that is none of the vocabulary: sequence and token in it."""
    for start, ids in _pieces(prefix):
        outside = (ids < 0) | (ids >= vocab_size)
        if outside.any():
            token = start + int(np.argmax(outside))
            break
    _, offsets = _index(prefix)
    byte = token * np.dtype(token_type(prefix)).itemsize
    before = np.flatnonzero(np.asarray(offsets) <= byte)
    sequence = int(before[np.argmax(offsets[before])])
    return f"first at token {token}, in sequence {sequence}"


def _index(prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """Length (tokens) and offset (bytes) of each sequence."""
    with open(f"{prefix}.idx", "rb") as stream:
        *_, n, _ = HEADER.unpack(stream.read(HEADER.size))
        lengths = np.fromfile(stream, np.int32, n)
        return lengths, np.fromfile(stream, np.int64, n)


def _in_order(
    prefix: str, lengths: np.ndarray, offsets: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """All tokens, in the order of their sequences, each piece with the number of its first."""
    dtype = np.dtype(token_type(prefix))
    ends = np.cumsum(lengths, dtype=np.int64)
    if np.array_equal(offsets, (ends - lengths) * dtype.itemsize):
        yield from _pieces(prefix)  # as Megatron writes them
        return
    tokens = np.memmap(f"{prefix}.bin", np.uint8, "r")
    for length, offset, end in zip(lengths.tolist(), offsets.tolist(), ends.tolist(), strict=True):
        for start in range(0, length, AT_ONCE_TOKENS):
            count = min(length - start, AT_ONCE_TOKENS)
            place = offset + start * dtype.itemsize
            yield end - length + start, np.frombuffer(tokens, dtype, count, place)


def _pieces(prefix: str) -> Iterator[tuple[int, np.ndarray]]:
    """All tokens of a .bin, piece by piece, each with the number of its first token."""
    dtype, file = np.dtype(token_type(prefix)), Path(f"{prefix}.bin")
    if not file.stat().st_size:
        return
    tokens = np.memmap(file, dtype, "r")
    for start in range(0, len(tokens), AT_ONCE_TOKENS):
        yield start, tokens[start : start + AT_ONCE_TOKENS]


def _hash_file(cache: Path, number: int) -> Path:
    return cache / f"{number:05d}{SUFFIX}"


def _read(cache: Path) -> dict[str, list[int]]:
    try:
        return json.loads((cache / "ranges.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or cut short: it is made anew
        return {}
