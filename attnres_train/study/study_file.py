"""From a study file to the configurations of its runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from attnres_train.config import shipped
from attnres_train.config.checks import check_config
from attnres_train.config.errors import ConfigError
from attnres_train.config.loader import config_of
from attnres_train.config.paths import expanded
from attnres_train.config.schema import RunConfig
from attnres_train.config.tree import Tree, parse_override, read_tree
from attnres_train.config.yaml_text import KeyPath, dotted
from attnres_train.study.schema import StudyFile
from attnres_train.study.settings import label_of, settings_of

_OWN = ("run.name", "run.dir")
EXTENDS = "extends"


@dataclass(frozen=True)
class StudyRun:
    name: str
    labels: Mapping[str, str]
    """The value of each axis, by its name."""
    config: RunConfig


@dataclass(frozen=True)
class Study:
    settings: StudyFile
    runs: Sequence[StudyRun]
    """In the order of the queue: all of one pair before the next, so that a study that is stopped
    early compares what it has."""

    @property
    def folder(self) -> Path:
        return Path(self.settings.study.dir) / self.settings.study.name


@dataclass(frozen=True)
class _Point:
    """A value of an axis."""

    axis: str
    label: str
    begins: Tree | None
    """The files that it extends."""
    over: Tree


def load_study(path: str | Path, overrides: Iterable[str] = (), *, files: bool = True) -> Study:
    """The study of file ``path``, or of one that comes with the package, with ``overrides``
    (``key.path=value``). Without ``files`` those of tokenizers may be missing.

    Raises ConfigError with every problem: keys of the study file by its lines, and of each run what
    `load_config` and `check_config` have to say.
    """
    file = shipped.find_study(path)
    tree = read_tree(file)
    for text in overrides:
        tree.merge(parse_override(text))
    settings = settings_of(tree)
    base, begins = _base(settings, tree, file), file.parent
    points = [list(_points(settings, tree, begins, n)) for n in range(len(settings.axes))]
    runs = [_run(settings, tree, base, chosen) for chosen in _in_order(settings, points)]
    _check_runs(settings, runs, files)
    return Study(settings, runs)


def _base(settings: StudyFile, tree: Tree, file: Path) -> Tree:
    where = f"base ({tree.place(('base',))})"
    try:
        found = shipped.find(expanded(settings.base), beside=file.parent)
    except ValueError as error:
        raise ConfigError(f"{where} is {settings.base!r}: {error}") from None
    return read_tree(found, f"{where}: ")


def _points(settings: StudyFile, tree: Tree, folder: Path, number: int) -> Iterator[_Point]:
    axis = settings.axes[number]
    at: KeyPath = ("axes", number, "values")
    if isinstance(axis.values, list):
        assert axis.key is not None  # `_axis_problems`
        for place, value in enumerate(axis.values):
            over = _over({axis.key: value}, tree, (*at, place))
            yield _Point(axis.name, label_of(value), None, over)
        return
    for label, values in axis.values.items():
        given = dict(values)
        begins = None
        if EXTENDS in given:
            where = f"{dotted((*at, label, EXTENDS))} ({tree.place((*at, label, EXTENDS))})"
            file = shipped.find(expanded(str(given.pop(EXTENDS))), beside=folder)
            begins = read_tree(file, f"{where}: ")
        yield _Point(axis.name, label, begins, _over(given, tree, (*at, label)))


def _over(values: Mapping[str, Any], tree: Tree, at: KeyPath) -> Tree:
    """``values`` of a run's configuration, dotted or nested, which stand ``at`` a key of the study
    file, as a tree of such a configuration."""
    found = Tree({}, {})
    for path, value, where in _leaves(values, tree, at, ()):
        if dotted(path) in _OWN:
            raise ConfigError(f"{dotted(path)} ({where}): a study gives its runs names and places")
        nested = value
        for name in reversed(path):
            nested = {name: nested}
        found.merge(Tree(nested, {path: where}))
    return found


def _leaves(
    values: Mapping[str, Any], tree: Tree, at: KeyPath, path: KeyPath
) -> Iterator[tuple[KeyPath, Any, str]]:
    for key, value in values.items():
        steps = tuple(int(step) if step.isdigit() else step for step in str(key).split("."))
        if isinstance(value, dict) and value:
            yield from _leaves(value, tree, (*at, key), (*path, *steps))
        else:
            yield (*path, *steps), value, tree.place((*at, key))


def _in_order(settings: StudyFile, points: list[list[_Point]]) -> Iterator[list[_Point]]:
    """Every combination, in which the axis of pairs changes last."""
    slow = [axis.name == settings.report.pair for axis in settings.axes]
    order = sorted(range(len(points)), key=lambda number: not slow[number])
    for chosen in product(*(points[number] for number in order)):
        yield [chosen[order.index(number)] for number in range(len(points))]


def _run(settings: StudyFile, tree: Tree, base: Tree, chosen: Sequence[_Point]) -> StudyRun:
    """Files first, then what all runs change, then what this one does."""
    whole = deepcopy(base)
    for point in chosen:
        if point.begins:
            whole.merge(deepcopy(point.begins))
    whole.merge(_over(settings.set, tree, ("set",)))
    for point in chosen:
        whole.merge(deepcopy(point.over))
    labels = {point.axis: point.label for point in chosen}
    name = ",".join(f"{axis}={label}" for axis, label in labels.items())
    folder = Path(settings.study.dir) / settings.study.name / "runs"
    own = {"run": {"name": name, "dir": str(folder)}}
    whole.merge(Tree(own, {("run", "name"): "the study", ("run", "dir"): "study.dir"}))
    try:
        return StudyRun(name, labels, config_of(whole))
    except ConfigError as error:
        raise ConfigError([f"run {name}: {one}" for one in error.problems]) from None


def elsewhere(config: RunConfig) -> RunConfig:
    """``config`` for a machine that has not its corpora: to be planned, not run."""
    corpus = type(config.data)().corpus
    return config.model_copy(update={"data": config.data.model_copy(update={"corpus": corpus})})


def _check_runs(settings: StudyFile, runs: Sequence[StudyRun], files: bool) -> None:
    problems = []
    for run in runs:
        try:
            check_config(run.config if files else elsewhere(run.config), None, files=files)
        except ConfigError as error:
            problems += [f"run {run.name}: {one}" for one in error.problems]
    report = settings.report
    seeds: dict[tuple[str, ...], StudyRun] = {}
    for run in runs:
        pair = tuple(label for axis, label in run.labels.items() if axis != report.compare)
        first = seeds.setdefault(pair, run)
        if first.config.run.seed != run.config.run.seed:
            problems.append(
                f"run {run.name}: run.seed is {run.config.run.seed}, but {first.config.run.seed} "
                f"in {first.name}, with which it is compared: they would see other samples"
            )
    if problems:
        raise ConfigError(problems[:20])
