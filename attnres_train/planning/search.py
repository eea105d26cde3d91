"""The search for a configuration's best grid on a number of devices.

Every setting that may fit is estimated by formula. The fastest are simulated, and so is the best of
every other choice, to tell why that loses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

from attnres_train.config.schema import RunConfig
from attnres_train.errors import UserError
from attnres_train.planning.devices import Device
from attnres_train.planning.estimate import Estimator, Step
from attnres_train.planning.grids import AXES, RECOMPUTE, Grid, Refused, Space, fits_nothing

SIMULATED = 24
"""Of the fastest by formula, which bubbles and hops may turn round."""


class Miss(NamedTuple):
    """A setting that does not fit, and the bytes that it needs (at least)."""

    memory: float
    grid: Grid


@dataclass
class Loser:
    """The best that can be had with another choice on one axis."""

    axis: str
    grid: Grid
    step: Step | None
    """None where nothing fits."""
    memory: float


@dataclass
class Found:
    """What a search has found: grids that fit, fastest first, one setting of each."""

    best: list[Grid]
    losers: list[Loser]
    refused: Refused
    considered: int
    fitting: int
    estimator: Estimator
    steps: dict[Grid, Step] = field(default_factory=dict)


def search(config: RunConfig, gpus: int, device: Device, *, shown: int = 5) -> Found:
    """The best ``shown`` grids of ``config``, whose own sizes do not count, on ``gpus`` devices.

    Raises UserError where there is no grid, or none fits: with the nearest that would.
    """
    if gpus < 1:
        raise UserError(f"--gpus is {gpus}: it must be at least 1")
    return Search(config, gpus, device).run(shown)


class Search:
    """Of one configuration without stages: `explore`, and then what is asked of it."""

    def __init__(self, config: RunConfig, gpus: int, device: Device) -> None:
        self.config, self.gpus, self.device = config, gpus, device
        self.space = Space(config, gpus, device.node_size)
        self.estimator = Estimator(config, device)
        self.memory = cache(lambda grid: self.estimator.memory(grid)["total"])
        self.simulated = cache(self.estimator.simulated)
        self.fitting: list[tuple[float, Grid]] = []
        self.misses: dict[tuple[str, object], Miss] = {}
        """By axis and value the one that misses by least."""
        self.considered = 0
        self.ranked: list[Grid] = []

    def explore(self) -> None:
        """Find what fits, fastest first by formula, and of the first of those by simulation. Raises
        UserError where nothing does."""
        for by_micro_batch in self.space.settings():
            self._consider(by_micro_batch)
        if not self.considered:
            raise UserError(fits_nothing(self.config, self.gpus))
        self.fitting.sort()
        self.ranked = self._ranked()
        if not self.ranked:
            raise UserError(self._nothing_fits())

    def run(self, shown: int) -> Found:
        self.explore()
        losers = list(self._losers(self.ranked[0]))
        while faster := [one.grid for one in losers if self._beats(one.step)]:
            self.ranked = self._sorted([*self.ranked, *faster])
            losers = list(self._losers(self.ranked[0]))
        return self.found(list(self._one_of_each())[:shown], losers)

    def found(self, best: list[Grid], losers: list[Loser]) -> Found:
        """With the simulated steps of ``best``."""
        return Found(
            best,
            losers,
            self.space.refused,
            self.considered,
            len(self.fitting),
            self.estimator,
            {grid: self.simulated(grid) for grid in best},
        )

    def _consider(self, by_micro_batch: list[list[Grid]]) -> None:
        """Estimate of each micro-batch size the fastest recomputation that fits."""
        for modes in by_micro_batch:
            self.considered += len(modes)
            for grid in modes:
                needed = self._needed(grid)
                if needed <= self.device.usable_memory:
                    self.fitting.append((self.estimator.step(grid).seconds, grid))
                    break
                self._missed(Miss(needed, grid))
            else:
                return  # larger micro-batches need more

    def _needed(self, grid: Grid) -> float:
        least = self.estimator.least_memory(grid)
        return least if least > self.device.usable_memory else self.memory(grid)

    def _missed(self, miss: Miss) -> None:
        for axis in AXES:
            key = axis, getattr(miss.grid, axis)
            if key not in self.misses or miss < self.misses[key]:
                self.misses[key] = miss

    def _ranked(self) -> list[Grid]:
        """The fastest, by simulation; what the checks refuse is left out."""
        accepted: list[Grid] = []
        for _, grid in self.fitting:
            if problems := self.space.problems(grid):
                self.space.refused.add("other relations", problems[0])
            else:
                accepted.append(grid)
            if len(accepted) == SIMULATED:
                break
        return self._sorted(accepted)

    def _sorted(self, grids: list[Grid]) -> list[Grid]:
        return sorted(set(grids), key=lambda grid: (self.simulated(grid).seconds, grid))

    def _beats(self, step: Step | None) -> bool:
        """Whether the simulation says of a loser what the formula did not."""
        return step is not None and step.seconds < self.simulated(self.ranked[0]).seconds

    def _one_of_each(self) -> Iterator[Grid]:
        """The first of every grid of processes."""
        seen = set()
        for grid in self.ranked:
            if grid.sizes not in seen:
                seen.add(grid.sizes)
                yield grid

    def _losers(self, winner: Grid) -> Iterator[Loser]:
        for axis in AXES:
            values = {key[1] for key in self.misses if key[0] == axis}
            values |= {getattr(grid, axis) for _, grid in self.fitting}
            if axis == "recompute":
                values |= set(RECOMPUTE)
            for value in sorted(values - {getattr(winner, axis)}, key=_order):
                yield self._with(winner, axis, value)

    def _with(self, winner: Grid, axis: str, value: object) -> Loser:
        """The best with ``value``, or what misses by least."""
        alike = (
            grid
            for grid in (*self.ranked, *(grid for _, grid in self.fitting))
            if getattr(grid, axis) == value
        )
        grid = next((one for one in alike if not self.space.problems(one)), None)
        if axis == "recompute":  # settings that cannot be faster were passed over
            changed = winner._replace(recompute=value)  # type: ignore[arg-type]
            if grid is None or self._needed(changed) <= self.device.usable_memory:
                grid = changed
        if grid is not None and self._needed(grid) <= self.device.usable_memory:
            return Loser(axis, grid, self.simulated(grid), self.memory(grid))
        miss = self.misses.get((axis, value)) or Miss(self._needed(winner), winner)
        if axis == "recompute" and grid is not None:
            miss = Miss(self._needed(grid), grid)
        return Loser(axis, miss.grid, None, miss.memory)

    def _nothing_fits(self) -> str:
        least = min(self.misses.values())
        gigabytes, usable = least.memory / 1e9, self.device.usable_memory / 1e9
        return (
            f"nothing fits {self.gpus} x {self.device.name}: a rank has {usable:.0f} of "
            f"{self.device.memory / 1e9:.0f} GB for the run, and the nearest ({least.grid}; "
            f"micro-batch {least.grid.micro_batch}, recompute {least.grid.recompute}) needs "
            f"{gigabytes:.0f} GB, {gigabytes - usable:.1f} GB too much; take more devices or "
            "larger ones, or a smaller model"
        )


def _order(value: object) -> tuple[str, object]:
    return type(value).__name__, RECOMPUTE.index(value) if value in RECOMPUTE else value
