"""The samples of a corpus, epoch after epoch, in an order that needs no memory, and what becomes of
that order when files come to the corpus while a run is on its way."""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# An order that mixes what is new with what is left strides by nearly this share of them: of any few
# steps, the old and the new are then hit about as often as there are of each.
GOLDEN_SHARE = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class _Whole:
    """From sample ``start`` on, whole epochs over ``size`` samples of generations that are
    ``sizes`` large, the first of which is number ``epoch``."""

    start: int
    epoch: int
    sizes: tuple[int, ...]

    @property
    def size(self) -> int:
        return sum(self.sizes)


@dataclass(frozen=True)
class _Mixed:
    """From sample ``start`` to ``stop``: what is ``left`` of epoch ``epoch`` in the order
    ``below``, and all of generation ``new``."""

    start: int
    stop: int
    epoch: int
    left: int
    new: int
    below: _Whole | _Mixed


class Order:
    """Which sample of a corpus comes as its i-th, without end: a pure function of seed, i and the
    generations of its files.

    A single generation: epoch 0 takes its samples as they lie, later epochs walk them in random
    strides (x -> a x + b modulo their number, a and b drawn from the seed and the epoch).

    Generation g > 0 comes to it at sample ``starts[g]``: from there to the end of the epoch, what
    is left of that and all of the new are walked together. Every sample comes once in that epoch,
    whatever had come to it before; the epochs after it walk all generations as one.
    """

    def __init__(self, seed: int, sizes: Sequence[int], starts: Sequence[int] = (0,)) -> None:
        """``sizes``: samples of each generation; ``starts`` ascend from 0."""
        self.seed = seed
        self._stretches: list[_Whole | _Mixed] = [_Whole(0, 0, (sizes[0],))]
        for new in range(1, len(sizes)):
            self._append(new, starts[new], tuple(sizes[: new + 1]))
        self._starts = [stretch.start for stretch in self._stretches]

    def _append(self, new: int, start: int, sizes: tuple[int, ...]) -> None:
        while self._stretches[-1].start > start:  # the epochs after one that has grown once more
            self._stretches.pop()
        below = self._stretches[-1]
        if isinstance(below, _Whole):
            epochs, place = divmod(start - below.start, below.size)
            epoch, left = below.epoch + epochs, below.size - place
        else:
            epoch, left = below.epoch, below.stop - start
        stop = start + left + sizes[new]
        self._stretches.append(_Mixed(start, stop, epoch, left, new, below))
        self._stretches.append(_Whole(stop, epoch + 1, sizes))

    def __call__(self, index: int) -> tuple[int, int]:
        """(generation, place in that) of the sample that comes as number ``index``."""
        stretch = self._stretches[bisect_right(self._starts, index) - 1]
        while isinstance(stretch, _Mixed):
            place = self._mixed(stretch, index - stretch.start)
            if place >= stretch.left:
                return stretch.new, place - stretch.left
            index, stretch = stretch.start + place, stretch.below
        epochs, place = divmod(index - stretch.start, stretch.size)
        place = self._walked(stretch.epoch + epochs, stretch.size, place)
        generation = 0
        while place >= stretch.sizes[generation]:
            place -= stretch.sizes[generation]
            generation += 1
        return generation, place

    def _walked(self, epoch: int, size: int, place: int) -> int:
        """Where epoch 0 has what ``epoch`` has at ``place`` of ``size``."""
        if epoch == 0:
            return place
        draw = random.Random(f"seed {self.seed} epoch {epoch}")
        offset, stride = draw.randrange(size), draw.randrange(size)
        while math.gcd(stride, size) != 1:
            stride = draw.randrange(size)
        return (stride * place + offset) % size

    def _mixed(self, stretch: _Mixed, place: int) -> int:
        """What comes at ``place`` of a mixed stretch: below ``left`` of the old, else new."""
        size = stretch.stop - stretch.start
        draw = random.Random(f"seed {self.seed} generation {stretch.new} at {stretch.start}")
        offset = draw.randrange(size)
        stride = int(size * (GOLDEN_SHARE + draw.uniform(-0.01, 0.01)))
        while math.gcd(stride, size) != 1:
            stride += 1
        return (stride * place + offset) % size


class EpochSamples:
    """The samples of a corpus, epoch after epoch without end, in the `Order` of its generations.

    Epoch 0 of a generation has the random order of its dataset, a GPTDataset of one epoch.
    """

    def __init__(
        self,
        dataset: Any,
        seed: int,
        with_ends: bool = False,
        later: Sequence[tuple[int, Any]] = (),
    ) -> None:
        """``later``: from which sample on another dataset belongs to it, and that dataset.
        ``with_ends`` adds ``sequence_ends`` to every sample (see `sequence_ends`)."""
        self.dataset = dataset
        self.generations = [dataset, *(added for _, added in later)]
        self.with_ends = with_ends
        sizes = [len(generation) for generation in self.generations]
        self.order = Order(seed, sizes, [0, *(start for start, _ in later)])
        # What BlendedDataset asks of its members.
        self.index_split = dataset.index_split
        self.unique_identifiers = dataset.unique_identifiers

    @property
    def samples_per_epoch(self) -> int:
        """Of an epoch over all generations."""
        return sum(map(len, self.generations))

    def __len__(self) -> int:
        return 1 << 62

    def __getitem__(self, index: int) -> dict[str, Any]:
        generation, place = self.order(int(index))
        dataset = self.generations[generation]
        sample: dict[str, Any] = dataset[place]
        if self.with_ends:
            sample["sequence_ends"] = sequence_ends(dataset, place)
        return sample


def sequence_ends(dataset: Any, place: int) -> np.ndarray:
    """Bool [seq_length]: the tokens of sample ``place`` of a GPTDataset that are the last ones of a
    stored sequence, which is a document (but see `shard_writer.SEQUENCE_TOKENS` and `held_out.Cut`;
    others' files may have several sequences in one). What follows in the sample comes from
    elsewhere in the corpus."""
    sample = dataset.shuffle_index[place]
    (first, offset), (last, _) = (dataset.sample_index[i].tolist() for i in (sample, sample + 1))
    lengths = [dataset.dataset.length(i) for i in dataset.document_index[first:last]]
    ends = np.zeros(dataset.config.sequence_length, dtype=bool)
    starts_after = np.cumsum(lengths, dtype=np.int64) - offset
    ends[starts_after[starts_after > 0] - 1] = True
    return ends
