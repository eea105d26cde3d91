"""The typed, closed schema of a study file. Every field's docstring is its documentation."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from attnres_train.config.paths import holding_names, holding_paths
from attnres_train.config.section import Section


class StudySection(Section):
    name: str = Field(min_length=1)
    """Name of the study; its folder is `<dir>/<name>`."""
    dir: str = Field("studies", min_length=1)
    """Folder that holds the studies."""
    keep_checkpoints: bool = True
    """Whether a run that has ended keeps its checkpoints; what it has measured stays either way."""

    _paths = holding_paths("dir")
    _names = holding_names("name")


class AxisConfig(Section):
    name: str = Field(min_length=1)
    """What the axis is called in the names of runs and in `report`."""
    key: str | None = None
    """Key of a run's configuration that `values`, a list, are of."""
    values: list[Any] | dict[str, dict[str, Any]] = Field(min_length=1)
    """Values of `key`; or names, each with the keys that it sets (dotted or nested) and, if it
    begins with files of its own, `extends`."""


class ReportConfig(Section):
    compare: str | None = None
    """Axis whose values are compared with `baseline`."""
    baseline: str | None = None
    """Value of `compare` that the others are compared with; default: its first."""
    pair: str | None = None
    """Axis of seeds: runs that differ in `compare` alone are a pair, and the mean is over pairs."""
    tune: str | None = None
    """Axis of which each value of `compare` takes its best value, by the mean over `pair`."""
    fit: str | None = None
    """Axis of sizes: a power law of loss over compute is fitted through them."""
    fit_floor: bool = False
    """Whether the law has a loss that no compute takes away."""
    metric: str = "validation_loss"
    """Key of a run's records, lower is better: `validation_loss`, `validation_bits_per_byte`, or
    one of them of a corpus, `validation_loss/<corpus>`."""
    take: Literal["final", "best"] = "final"
    """Which of a run's values counts: that of its last step, or its lowest."""
    confidence: float = Field(0.95, gt=0, lt=1)
    """Of all intervals."""


class StudyFile(Section):
    study: StudySection
    """Name and place."""
    base: str = Field(min_length=1)
    """Configuration of a run, a file relative to this one or the name of one that comes with the
    package."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Keys of a run's configuration, dotted or nested, that all runs change."""
    axes: list[AxisConfig] = Field(min_length=1)
    """What runs differ in: there is one run for each combination of values."""
    report: ReportConfig = Field(default_factory=ReportConfig)
    """What is compared with what."""

    def axis(self, name: str) -> AxisConfig:
        return next(axis for axis in self.axes if axis.name == name)
