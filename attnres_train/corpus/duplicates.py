"""Documents that are there already: equal ones, and those most of whose paragraphs are."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

NEAR = 0.8
"""Share of a document's characters, in paragraphs that were seen before, at which it is dropped."""
_SHORTEST = 20
"""Characters of a paragraph that tells anything."""
_BORDER = re.compile(r"\n\s*\n")


class Seen:
    """What has been kept so far, by hashes of 64 bits."""

    def __init__(self) -> None:
        self.documents: set[int] = set()
        self.paragraphs: set[int] = set()
        self._new: tuple[list[int], list[int]] = ([], [])

    def judge(self, text: str) -> str:
        """``kept``, ``equal`` or ``near``; a document that is kept is seen from now on."""
        own = _hash(text)
        if own in self.documents:
            return "equal"
        paragraphs = list(_paragraphs(text))
        known = sum(size for number, size in paragraphs if number in self.paragraphs)
        if paragraphs and known >= NEAR * sum(size for _, size in paragraphs):
            return "near"
        self._add([own], [number for number, _ in paragraphs])
        self._new[0].append(own)
        self._new[1].extend(number for number, _ in paragraphs)
        return "kept"

    def _add(self, documents: list[int], paragraphs: list[int]) -> None:
        self.documents.update(documents)
        self.paragraphs.update(paragraphs)

    def save(self, path: Path) -> None:
        """What is new since the beginning or the last `save` or `load`."""
        documents, paragraphs = (np.array(one, dtype=np.uint64) for one in self._new)
        np.savez(path, documents=documents, paragraphs=paragraphs)
        self._new = ([], [])

    def load(self, path: Path) -> None:
        with np.load(path) as saved:
            self._add(saved["documents"].tolist(), saved["paragraphs"].tolist())


def _paragraphs(text: str) -> Iterator[tuple[int, int]]:
    """(hash, characters) of each paragraph that tells anything, however it is indented or broken
    into lines."""
    for paragraph in _BORDER.split(text):
        words = " ".join(paragraph.split())
        if len(words) >= _SHORTEST:
            yield _hash(words), len(words)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
