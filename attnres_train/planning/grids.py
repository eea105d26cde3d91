"""The grids, layouts and settings that a search goes through: what the checks refuse is left out
before anything is computed, and told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from attnres_train.config import ConfigError, check_config
from attnres_train.config.checks import data_parallel_size
from attnres_train.config.schema import RunConfig

Recompute = Literal["none", "selective", "full"]
LayoutName = Literal["even", "auto"]
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
_LAYOUTS: tuple[LayoutName, ...] = ("even", "auto")
_MOST_VIRTUAL, _MOST_SAMPLES = 4, 16
_LEAST_SHARE = 2048
"""Tokens of a sample that a context-parallel rank has at least: with fewer it pays for nothing."""

AXES = {
    "tensor": "parallel.tensor_model_parallel_size",
    "context": "parallel.context_parallel_size",
    "expert": "parallel.expert_model_parallel_size",
    "pipeline": "parallel.pipeline_model_parallel_size",
    "virtual": "parallel.virtual_pipeline_model_parallel_size",
    "layout": "parallel.layout",
    "micro_batch": "train.micro_batch_size",
    "recompute": "train.recompute",
}
"""What is searched: the field of a `Grid` -> the key of the configuration."""


class Grid(NamedTuple):
    """One way to run a configuration."""

    tensor: int
    context: int
    expert: int
    data: int
    pipeline: int
    virtual: int
    layout: LayoutName
    micro_batch: int
    recompute: Recompute

    @property
    def stage(self) -> int:
        """Ranks of a stage."""
        return self.tensor * self.context * self.data

    @property
    def sizes(self) -> tuple[int, ...]:
        """What tells one grid of processes from another."""
        return self.tensor, self.context, self.expert, self.data, self.pipeline

    def sections(self) -> dict[str, dict[str, Any]]:
        """The keys of a configuration that it sets, by section."""
        found: dict[str, dict[str, Any]] = {}
        for axis, key in AXES.items():
            section, _, name = key.partition(".")
            found.setdefault(section, {})[name] = getattr(self, axis)
        return found

    def of(self, config: RunConfig) -> RunConfig:
        """``config`` on this grid, all stages of it alike."""
        sections = self.sections()
        changed: dict[str, Any] = {
            section: getattr(config, section).model_copy(update=values)
            for section, values in sections.items()
        }
        changed["stages"] = [
            stage.model_copy(update={"train": stage.train.model_copy(update=sections["train"])})
            for stage in config.stages
        ]
        return config.model_copy(update=changed)

    @property
    def place(self) -> Grid:
        """What stages of a run have in common: all but micro-batch and recomputation."""
        return self._replace(micro_batch=1, recompute="none")

    def __str__(self) -> str:
        sizes = ("tensor", "context", "expert", "data", "pipeline", "virtual")
        parts = [f"{name} {getattr(self, name)}" for name in sizes if getattr(self, name) > 1]
        return ", ".join(parts) or "one process"


ALONE = Grid(1, 1, 1, 1, 1, 1, "even", 1, "none")
"""One process, whatever the configuration's own sizes are."""


def grid_of(config: RunConfig, gpus: int) -> Grid:
    """The grid that a checked ``config`` has on ``gpus`` devices. Its layout has to be ``even`` or
    ``auto``."""
    values = {}
    for axis, key in AXES.items():
        section, _, name = key.partition(".")
        values[axis] = getattr(getattr(config, section), name)
    return Grid(**values, data=data_parallel_size(config, gpus))


@dataclass
class Refused:
    """What was left out because it cannot be run: how many grids of processes, and one's reason."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, what: str, example: str, count: int = 1) -> None:
        self.counts[what] += count
        self.examples.setdefault(what, example)


class Space:
    """All grids of ``config`` on ``gpus`` devices, of which ``node`` share a node."""

    def __init__(self, config: RunConfig, gpus: int, node: int) -> None:
        self.config, self.gpus, self.node = config, gpus, node
        self.refused = Refused()
        self._accepted: dict[tuple[str, int], bool] = {}

    def settings(self) -> Iterator[list[list[Grid]]]:
        """For every grid of processes and layout, in a fixed order: by micro-batch size, smallest
        first, the modes of recomputation, fastest first. Every size by itself passes the checks;
        together: `problems`."""
        most_context = max(1, self.config.train.seq_length // _LEAST_SHARE)
        for pipeline in self._sizes("pipeline", divisors(self.gpus)):
            of_stage = self.gpus // pipeline
            for tensor in self._sizes("tensor", powers(min(self.node, of_stage))):
                for context in self._sizes("context", powers(min(most_context, of_stage))):
                    if of_stage % (tensor * context):
                        continue
                    yield from self._stage(pipeline, tensor, context)

    def problems(self, grid: Grid) -> list[str]:
        """What the checks say against ``grid``."""
        return self._problems(grid.of(self.config), self.gpus)

    def _stage(self, pipeline: int, tensor: int, context: int) -> Iterator[list[list[Grid]]]:
        config, of_stage = self.config, self.gpus // pipeline
        data = of_stage // (tensor * context)
        samples, rest = divmod(config.train.global_batch_size, data)
        if rest or not samples:
            self.refused.add(
                "global batch",
                f"train.global_batch_size {config.train.global_batch_size} is not divisible by "
                f"{data} replicas",
            )
            return
        experts = config.model.moe.num_experts if _has_experts(config) else 1
        for expert in self._sizes("expert", [n for n in divisors(experts) if of_stage % n == 0]):
            for virtual, layout in self._layouts(pipeline):
                place = Grid(tensor, context, expert, data, pipeline, virtual, layout, 1, "none")
                yield [
                    [place._replace(micro_batch=n, recompute=mode) for mode in RECOMPUTE]
                    for n in powers(_MOST_SAMPLES)
                    if samples % n == 0
                ]

    def _layouts(self, pipeline: int) -> Iterator[tuple[int, LayoutName]]:
        if pipeline == 1:
            yield 1, "even"
            return
        for virtual in range(1, _MOST_VIRTUAL + 1):
            if pipeline * virtual <= self.config.model.num_layers:
                for layout in _LAYOUTS:
                    yield virtual, layout

    def _sizes(self, axis: str, sizes: list[int]) -> list[int]:
        return [size for size in sizes if size == 1 or self._accepts(axis, size)]

    def _accepts(self, axis: str, size: int) -> bool:
        """Whether nothing is said against this size by itself."""
        if (axis, size) not in self._accepted:
            values: dict[str, Any] = {axis: size}
            alone = ALONE._replace(**values).of(self.config)
            key = AXES[axis]
            told = [text for text in self._problems(alone, None) if key in text]
            if told:
                self.refused.add(axis, told[0])
            self._accepted[axis, size] = not told
        return self._accepted[axis, size]

    def _problems(self, config: RunConfig, gpus: int | None) -> list[str]:
        try:
            check_config(config, gpus, files=False)
        except ConfigError as error:
            return error.problems
        return []


def fits_nothing(config: RunConfig, gpus: int) -> str:
    """Why ``gpus`` devices have no grid at all, with the nearest numbers that have one."""
    batch = config.train.global_batch_size
    near = [
        number
        for number in sorted(range(1, 2 * gpus + 1), key=lambda n: (abs(n - gpus), n))
        if number != gpus
        and any(
            batch % (number // p) == 0 for p in divisors(number) if p <= config.model.num_layers
        )
    ][:2]
    return (
        f"--gpus {gpus}: no grid of so many has replicas that train.global_batch_size {batch} can "
        f"be divided by; take {' or '.join(map(str, sorted(near)))}"
    )


def divisors(number: int) -> list[int]:
    """Ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


def powers(most: int) -> list[int]:
    """Of two, up to ``most``."""
    return [2**n for n in range(most.bit_length()) if 2**n <= most]


def _has_experts(config: RunConfig) -> bool:
    return any(not config.model.is_dense(layer) for layer in range(config.model.num_layers))
