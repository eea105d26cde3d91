"""A number of 64 bits for every document, which depends on nothing but what the document holds:
which side of the split it is on follows from it (`held_out`)."""

from __future__ import annotations

import hashlib

import numpy as np

# Beside a shard of ours: the hash of each document's text, uint64, little-endian.
SUFFIX = ".hashes"
# Odd, with bits set at random.
_BASE, _TOKEN, _END = 0xA24BAED4963EE407, 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9


class TextHash:
    """Of texts that come piece by piece: however they are cut, equal texts have equal hashes."""

    def __init__(self) -> None:
        self._state = hashlib.blake2b(digest_size=8)

    def update(self, text: str) -> int:
        """Take the next piece. Returns its bytes in UTF-8."""
        content = text.encode(errors="surrogatepass")
        self._state.update(content)
        return len(content)

    def take(self) -> int:
        """The hash of the text so far; another text begins."""
        value = int.from_bytes(self._state.digest(), "little")
        self._state = hashlib.blake2b(digest_size=8)
        return value


class TokenHashes:
    """Of documents of tokens that come piece by piece, modulo 2^64:

        h = mix(sum over i of m(t_i) b^i  +  n c),   i = 0 ... n - 1

    for n tokens t_i, constants b and c, and m and mix that spread the bits. Equal documents have
    equal hashes, whatever type of integer they are stored in.
    """

    def __init__(self, lengths: np.ndarray, at_once: int) -> None:
        """``lengths``: tokens of each document, int64 [documents]. ``at_once``: tokens of a piece,
        at most."""
        self._lengths = lengths
        self._filled = np.flatnonzero(lengths)  # those that have a place in the stream of tokens
        self._starts = (np.cumsum(lengths) - lengths)[self._filled]
        self._sums = np.zeros(len(lengths), np.uint64)
        self._powers = _powers(_BASE, at_once)
        self._inverses = _powers(pow(_BASE, -1, 1 << 64), at_once)

    def add(self, first: int, ids: np.ndarray) -> None:
        """Take the tokens ``ids`` of the stream of all documents, of which the first has the number
        ``first``."""
        begin = int(np.searchsorted(self._starts, first, side="right")) - 1
        end = int(np.searchsorted(self._starts, first + len(ids), side="left"))
        places = np.maximum(self._starts[begin:end] - first, 0)
        terms = _mixed(ids.astype(np.int64).view(np.uint64))
        terms *= self._powers[: len(ids)]
        # b^i counts from the beginning of the piece here: brought to that of each document.
        shifts = self._inverses[places]
        before = int(first - self._starts[begin])
        shifts[0] = pow(_BASE, before, 1 << 64) if before > 0 else shifts[0]
        self._sums[self._filled[begin:end]] += np.add.reduceat(terms, places) * shifts

    def take(self) -> np.ndarray:
        """The hashes, uint64 [documents], after all tokens."""
        return _mixed(_mixed(self._sums + self._lengths.astype(np.uint64) * np.uint64(_END)))


def _powers(base: int, count: int) -> np.ndarray:
    factors = np.full(count, base, np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)


def _mixed(values: np.ndarray) -> np.ndarray:
    """A permutation of the numbers of 64 bits, after the finalizers of splitmix64."""
    values = values ^ (values >> np.uint64(30))
    values *= np.uint64(_TOKEN)
    values += np.uint64(_END)
    values ^= values >> np.uint64(32)
    values *= np.uint64(_TOKEN)
    return values
