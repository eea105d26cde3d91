"""The lowest and the highest token id of every file, looked at once: an id without an embedding is
told before step 1, be it in a document that is held out or in the last of a large corpus."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from attnres_train.data.cache import write_json
from attnres_train.data.indexed import HEADER, token_type
from attnres_train.errors import UserError

AT_ONCE_TOKENS = 1 << 22


def check_vocabulary(prefixes: Sequence[str], vocab_size: int, where: str, cache: Path) -> None:
    """Check that every token id in ``prefixes``' .bin files is in [0, ``vocab_size``).

    What was found is kept in the file ``cache``: a shard that has not changed since (size and
    time) is not read again. Raises UserError that names ``where``, the file, and the first token
    outside.
    """
    known = _read(cache)
    ranges: dict[str, list[int]] = {}
    for prefix in prefixes:
        stat = Path(f"{prefix}.bin").stat()
        seen = [stat.st_size, stat.st_mtime_ns]
        found = known.get(prefix, [])
        ranges[prefix] = found if found[:2] == seen else [*seen, *token_range(prefix)]
    if ranges != known:
        write_json(cache, ranges)
    for prefix, (_, _, low, high) in ranges.items():
        if low < 0 or high >= vocab_size:
            raise UserError(
                f"{where} holds token id {low if low < 0 else high}, but model.vocab_size is "
                f"{vocab_size}: it was tokenised for another vocabulary ({prefix}.bin, "
                f"{_first_outside(prefix, vocab_size)})"
            )


def token_range(prefix: str) -> tuple[int, int]:
    """The lowest and the highest token id in ``prefix``.bin; (0, 0) where it has none."""
    low = high = None
    for _, ids in _pieces(prefix):
        low = int(ids.min()) if low is None else min(low, int(ids.min()))
        high = int(ids.max()) if high is None else max(high, int(ids.max()))
    return (low or 0, high or 0)


def _first_outside(prefix: str, vocab_size: int) -> str:
    """Where the first id stands that is none of the vocabulary: sequence and token in it."""
    for start, ids in _pieces(prefix):
        outside = (ids < 0) | (ids >= vocab_size)
        if outside.any():
            token = start + int(np.argmax(outside))
            break
    with open(f"{prefix}.idx", "rb") as stream:
        *_, n, _ = HEADER.unpack(stream.read(HEADER.size))
    offsets = np.memmap(f"{prefix}.idx", np.int64, "r", HEADER.size + 4 * n, (n,))
    byte = token * np.dtype(token_type(prefix)).itemsize
    before = np.flatnonzero(np.asarray(offsets) <= byte)
    sequence = int(before[np.argmax(offsets[before])])
    return f"first at token {token}, in sequence {sequence}"


def _pieces(prefix: str) -> Iterator[tuple[int, np.ndarray]]:
    """All tokens of a .bin, piece by piece, each with the number of its first token."""
    dtype, file = np.dtype(token_type(prefix)), Path(f"{prefix}.bin")
    if not file.stat().st_size:
        return
    tokens = np.memmap(file, dtype, "r")
    for start in range(0, len(tokens), AT_ONCE_TOKENS):
        yield start, tokens[start : start + AT_ONCE_TOKENS]


def _read(cache: Path) -> dict[str, list[int]]:
    try:
        return json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or cut short: it is made anew
        return {}
