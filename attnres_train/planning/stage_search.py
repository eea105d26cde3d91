"""The search for the grid of a run in stages: one for all of them, on which each stage has the
micro-batch and the recomputation that suit it."""

from __future__ import annotations

from dataclasses import dataclass
from heapq import nsmallest
from itertools import islice

from attnres_train.config.schema import RunConfig
from attnres_train.config.stages import called, stage_configs
from attnres_train.errors import UserError
from attnres_train.planning.devices import Device
from attnres_train.planning.grids import Grid
from attnres_train.planning.search import SIMULATED, Found, Search

_SETTINGS = 2
"""Of a stage on a grid, the fastest by formula, that are simulated."""


@dataclass
class FoundStages:
    """What a search has found for the stages of ``config``."""

    config: RunConfig
    stages: list[Found]
    """Of each stage: number n of all ``best`` together is one way to run all, the fastest first."""
    alone: list[Grid]
    """What each stage would be fastest on if it were a run of its own."""

    def seconds(self, number: int) -> float:
        """Of all steps of all stages."""
        return sum(self.of_stages(number))

    def of_stages(self, number: int) -> list[float]:
        """Seconds of all steps of each stage."""
        return [
            stage.train.train_iters * found.steps[found.best[number]].seconds
            for stage, found in zip(self.config.stages, self.stages, strict=True)
        ]


def search_stages(config: RunConfig, gpus: int, device: Device, *, shown: int = 5) -> FoundStages:
    """The ``shown`` grids on ``gpus`` devices on which all stages of ``config`` take least time
    together. Raises UserError, which names the stage, where there is none for a stage or for all.
    """
    if gpus < 1:
        raise UserError(f"--gpus is {gpus}: it must be at least 1")
    searches = []
    for number, stage in enumerate(stage_configs(config)):
        searches.append(Search(stage.model_copy(update={"stages": []}), gpus, device))
        try:
            searches[-1].explore()
        except UserError as error:
            raise UserError(f"{called(config, number)}: {error}") from error
    ways = _ways(config, searches)
    if not ways:
        raise UserError(_nothing_in_common(config, gpus, searches))
    iters = [stage.train.train_iters for stage in config.stages]

    def seconds(way: list[Grid]) -> float:
        steps = (search.simulated(grid) for search, grid in zip(searches, way, strict=True))
        return sum(count * step.seconds for count, step in zip(iters, steps, strict=True))

    of_sizes: dict[tuple[int, ...], list[Grid]] = {}
    for way in sorted(ways, key=lambda way: (seconds(way), way)):
        of_sizes.setdefault(way[0].sizes, way)
    best = list(of_sizes.values())[:shown]
    stages = []
    for number, search in enumerate(searches):
        found = search.found([way[number] for way in best], [])
        found.steps[search.ranked[0]] = search.simulated(search.ranked[0])
        stages.append(found)
    return FoundStages(config, stages, [search.ranked[0] for search in searches])


def _ways(config: RunConfig, searches: list[Search]) -> list[list[Grid]]:
    """Of the places that are fastest by formula a grid for every stage, by simulation."""
    by_stage = [_by_place(search) for search in searches]
    common = set.intersection(*(set(places) for places in by_stage))
    iters = [stage.train.train_iters for stage in config.stages]

    def seconds(place: Grid) -> tuple[float, Grid]:
        fastest = (places[place][0][0] for places in by_stage)
        return sum(count * one for count, one in zip(iters, fastest, strict=True)), place

    # More than are simulated: the checks may refuse some.
    places = nsmallest(4 * SIMULATED, common, key=seconds)
    made = (
        [_setting(search, at[place]) for search, at in zip(searches, by_stage, strict=True)]
        for place in places
    )
    whole = ([grid for grid in way if grid is not None] for way in made if None not in way)
    return list(islice(whole, SIMULATED))


def _by_place(search: Search) -> dict[Grid, list[tuple[float, Grid]]]:
    """What fits, by place, the fastest first."""
    places: dict[Grid, list[tuple[float, Grid]]] = {}
    for seconds, grid in search.fitting:
        places.setdefault(grid.place, []).append((seconds, grid))
    return places


def _setting(search: Search, fitting: list[tuple[float, Grid]]) -> Grid | None:
    """The fastest, by simulation, of the few that are by formula and pass the checks."""
    accepted = (grid for _, grid in fitting if not search.space.problems(grid))
    few = list(islice(accepted, _SETTINGS))
    return min(few, key=lambda grid: (search.simulated(grid).seconds, grid)) if few else None


def _nothing_in_common(config: RunConfig, gpus: int, searches: list[Search]) -> str:
    alone = "; ".join(
        f"{called(config, number)} fits {search.ranked[0]}"
        for number, search in enumerate(searches)
    )
    return (
        f"no grid of {gpus} devices fits all stages, though each has some ({alone}): take more "
        "devices or larger ones, or train up to a border (train.stop_after) and go on with other "
        "`parallel` keys (docs/stages.md)"
    )
