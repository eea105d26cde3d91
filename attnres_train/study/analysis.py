"""What a study has found, from its record alone (`study.record`): the mean of every cell, the best
value of the tuned axis, paired differences, their course over tokens, power laws over sizes.

Words: an axis has labels. `compare`, `pair`, `tune` and `fit` are the parts that `report` gives to
axes; a **group** is a choice of label on each axis that is neither of the first three.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from statistics import fmean, stdev
from typing import Any

from attnres_train.study.statistics import Difference, paired

Record = Mapping[str, Any]
Labels = tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """The runs of one kind and one value of the tuned axis, in a group."""

    kind: str
    tuned: str
    values: Mapping[str, float]
    """The metric of each pair that has one."""
    wanted: int
    """Pairs that there are to be."""

    @property
    def mean(self) -> float:
        return fmean(self.values.values()) if self.values else math.nan

    @property
    def deviation(self) -> float | None:
        return stdev(self.values.values()) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Comparison:
    kind: str
    tuned: str
    """Label of the tuned axis for `kind`."""
    baseline_tuned: str
    pairs: Labels
    difference: Difference


@dataclass(frozen=True)
class Group:
    labels: Mapping[str, str]
    cells: Sequence[Cell]
    best: Mapping[str, Cell]
    """By kind; without a kind that no run has ended of."""
    at_edge: frozenset[str]
    """Kinds whose best value of the tuned axis is its first or last: the best may lie beyond."""
    tuned: Sequence[Comparison]
    """Each kind at its best against the baseline at its best."""
    alike: Sequence[Comparison] = field(default_factory=list)
    """Each kind against the baseline at the same value of the tuned axis."""


class Analysis:
    """Of a record. Raises ValueError where that has no run."""

    def __init__(self, record: Record) -> None:
        self.record, self.report = record, record["report"]
        self.axes: Mapping[str, list[str]] = record["axes"]
        self.compare, self.pair, self.tune = (
            self.report[part] for part in ("compare", "pair", "tune")
        )
        self.kinds = self._labels(self.compare)
        self.baseline = self.report["baseline"] or self.kinds[0]
        self.runs = {self._key(run["labels"]): run for run in record["runs"]}
        roles = (self.compare, self.pair, self.tune)
        self.outer = [name for name in self.axes if name not in roles]
        chosen = product(*(self.axes[name] for name in self.outer))
        self.groups = [self._group(dict(zip(self.outer, one, strict=True))) for one in chosen]

    def _labels(self, axis: str | None) -> list[str]:
        """Of an axis; one nameless label where no axis has the part."""
        return self.axes[axis] if axis else [""]

    def _key(self, labels: Mapping[str, str]) -> Labels:
        return tuple(labels[name] for name in self.axes)

    def run(self, group: Mapping[str, str], kind: str, tuned: str, pair: str) -> Record | None:
        parts = {self.compare: kind, self.tune: tuned, self.pair: pair}
        return self.runs.get(tuple({**group, **parts}[name] for name in self.axes))

    def curve(self, run: Record) -> dict[int, float]:
        """The metric of a run by tokens, where it is finite."""
        points = run["curves"].get(self.report["metric"], [])
        return {int(tokens): value for tokens, value in points if value is not None}

    def value(self, run: Record) -> float | None:
        """What counts of a run; None where its last value is not finite, for it has diverged."""
        points = run["curves"].get(self.report["metric"], [])
        if not points or points[-1][1] is None:
            return None
        curve = self.curve(run)
        return min(curve.values()) if self.report["take"] == "best" else curve[int(points[-1][0])]

    def _group(self, labels: Mapping[str, str]) -> Group:
        tunes = self._labels(self.tune)
        cells = {
            (kind, tuned): self._cell(labels, kind, tuned) for kind in self.kinds for tuned in tunes
        }
        best = {kind: found for kind in self.kinds if (found := self._best(cells, kind))}
        ends = {tunes[0], tunes[-1]} if len(tunes) > 1 else set()
        others = [kind for kind in self.kinds if kind != self.baseline]
        tuned: list[Comparison] = []
        alike: list[Comparison] = []
        for kind in others:
            if kind in best and self.baseline in best:
                tuned += self._compare(best[kind], best[self.baseline])
            for one in tunes if len(tunes) > 1 else []:
                alike += self._compare(cells[kind, one], cells[self.baseline, one])
        at_edge = frozenset(kind for kind, cell in best.items() if cell.tuned in ends)
        return Group(labels, list(cells.values()), best, at_edge, tuned, alike)

    def _cell(self, group: Mapping[str, str], kind: str, tuned: str) -> Cell:
        pairs = self._labels(self.pair)
        found = {pair: self.run(group, kind, tuned, pair) for pair in pairs}
        values = {pair: self.value(run) for pair, run in found.items() if run is not None}
        kept = {pair: value for pair, value in values.items() if value is not None}
        return Cell(kind, tuned, kept, len(pairs))

    def _best(self, cells: Mapping[tuple[str, str], Cell], kind: str) -> Cell | None:
        """Of the cells of ``kind`` with the most pairs, that of the lowest mean: a value with which
        a run fails or diverges is none to choose."""
        mine = [cell for (name, _), cell in cells.items() if name == kind and cell.values]
        return min(mine, key=lambda cell: (-len(cell.values), cell.mean), default=None)

    def _compare(self, cell: Cell, baseline: Cell) -> Iterator[Comparison]:
        pairs = tuple(pair for pair in cell.values if pair in baseline.values)
        if pairs:
            difference = paired(
                [cell.values[pair] for pair in pairs],
                [baseline.values[pair] for pair in pairs],
                self.report["confidence"],
            )
            yield Comparison(cell.kind, cell.tuned, baseline.tuned, pairs, difference)

    def course(self, group: Group, comparison: Comparison) -> list[tuple[int, Difference]]:
        """The difference of ``comparison`` at every number of tokens that all its runs have been
        measured at."""
        curves = []
        for pair in comparison.pairs:
            runs = (
                self.run(group.labels, comparison.kind, comparison.tuned, pair),
                self.run(group.labels, self.baseline, comparison.baseline_tuned, pair),
            )
            curves.append([self.curve(run) for run in runs if run is not None])
        tokens = set.intersection(*(set(curve) for two in curves for curve in two))
        return [
            (
                count,
                paired(
                    [mine[count] for mine, _ in curves],
                    [other[count] for _, other in curves],
                    self.report["confidence"],
                ),
            )
            for count in sorted(tokens)
        ]
