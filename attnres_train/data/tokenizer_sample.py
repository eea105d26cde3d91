"""The text that a tokenizer is trained on: passages from all over the corpora, by weight. However
large those are, little more is read of them than is used."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

from attnres_train.data.corpora.reader import CorpusReader

# More costs time and hardly changes a vocabulary of thousands.
SAMPLE_BYTES = 16 << 20
# What is taken at one place.
EXCERPT_BYTES = 16 << 10
# Places that are looked for in a corpus, at most: of tiny files there would be no end.
MAX_PLACES = 1 << 16
# Multiples of it, modulo 1, lie evenly however many there are.
_GOLDEN_RATIO = (5**0.5 - 1) / 2


def sample(corpora: Sequence[CorpusReader]) -> Iterator[str]:
    """About SAMPLE_BYTES of text of ``corpora``, of each by its weight; always the same."""
    total = sum(corpus.section.weight for corpus in corpora)
    for corpus in corpora:
        yield from _of_corpus(corpus, int(SAMPLE_BYTES * corpus.section.weight / total))


def _of_corpus(corpus: CorpusReader, budget: int) -> Iterator[str]:
    """All that it has, or passages at even distances."""
    sizes = [corpus.text_bytes(file) for file in corpus.files]
    if sum(sizes) <= budget:
        for file in corpus.files:
            yield from (passage.text for passage in corpus.read(file))
        return
    for number, places in places_in(sizes, budget).items():
        yield from corpus.some_text(corpus.files[number], places, EXCERPT_BYTES)


def places_in(sizes: Sequence[int], budget: int) -> dict[int, list[float]]:
    """Where to read ``budget`` bytes of files of ``sizes``, at a time EXCERPT_BYTES or a whole
    smaller file: the numbers of files, each with places in [0, 1), ascending."""
    ends = list(accumulate(sizes))
    places: dict[int, list[float]] = {}
    left = budget
    for draw in range(MAX_PLACES):
        if left <= 0:
            break
        place = (draw + 0.5) * _GOLDEN_RATIO % 1 * ends[-1]
        file = bisect_right(ends, place)
        size = sizes[file]
        if size > EXCERPT_BYTES:
            places.setdefault(file, []).append((place - (ends[file] - size)) / size)
            left -= EXCERPT_BYTES
        elif file not in places:
            places[file] = [0.0]
            left -= size
    return {file: sorted(places[file]) for file in sorted(places)}
