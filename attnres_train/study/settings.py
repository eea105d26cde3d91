"""A study file against its schema, and what the schema cannot say: axes and the report's parts."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from attnres_train.config.errors import ConfigError
from attnres_train.config.fields import inner_section, locate
from attnres_train.config.paths import TOLD_AS_IT_IS
from attnres_train.config.section import Section
from attnres_train.config.tree import Tree
from attnres_train.config.yaml_text import KeyPath, dotted, flow
from attnres_train.study.schema import StudyFile

_LABEL = re.compile(r"[\w.+-]+")


def settings_of(tree: Tree) -> StudyFile:
    """The study that ``tree`` says. Raises ConfigError with every problem: the key, its file and
    line, what is expected there."""
    try:
        settings = StudyFile.model_validate(tree.values)
    except ValidationError as error:
        told = dict(_problem(tree, one) for one in error.errors())
        raise ConfigError(list(told.values())) from None
    problems = [*_axis_problems(settings, tree), *_report_problems(settings, tree)]
    if problems:
        raise ConfigError(problems)
    return settings


def _problem(tree: Tree, error: ErrorDetails) -> tuple[KeyPath, str]:
    path, wanted = locate(error["loc"], tree.values, StudyFile)
    key = dotted(path)
    if error["type"] == "missing":
        return path, f"{key}: missing from {tree.place(path[:-1])}; expected {wanted}"
    here = f"{key} ({tree.place(path)})"
    if not wanted:
        return path, f"{here}: unknown key; {_instead(path)}"
    if error["type"] == TOLD_AS_IT_IS:
        return path, f"{here} is {flow(tree.at(path))}: {error['msg']}"
    return path, f"{here}: expected {wanted}, not {flow(tree.at(path))}"


def _instead(path: KeyPath) -> str:
    keys = dict(_keys(StudyFile, ()))
    *outer, name = (step for step in path if isinstance(step, str))
    known = [key for *around, key in keys if around == outer]
    near = difflib.get_close_matches(str(name), known, n=1)
    if near:
        return f"did you mean {dotted((*path[:-1], *near))}?"
    return (
        f"known here: {', '.join(known)}; keys of a run's configuration stand in `set` or an axis"
    )


def _keys(section: type[Section], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], None]]:
    for name, field in section.model_fields.items():
        yield (*path, name), None
        if inner := inner_section(field.annotation):
            yield from _keys(inner, (*path, name))


def _axis_problems(settings: StudyFile, tree: Tree) -> Iterator[str]:
    names = [axis.name for axis in settings.axes]
    for number, axis in enumerate(settings.axes):
        at = ("axes", number)
        if names.index(axis.name) != number or not _LABEL.fullmatch(axis.name):
            where = tree.place((*at, "name"))
            yield f"axes.{number}.name ({where}) is {axis.name!r}: a word that no other axis has"
        where = f"axes.{number}.values ({tree.place((*at, 'values'))})"
        if isinstance(axis.values, list) != (axis.key is not None):
            yield f"{where}: a list goes with `key`, and names with the keys that each sets do not"
        for label in map(label_of, axis.values):
            if not _LABEL.fullmatch(label):
                yield (
                    f"{where}: {label} cannot stand in the name of a run: give it a name "
                    "(NAME: {KEY: VALUE})"
                )


def label_of(value: Any) -> str:
    return value if isinstance(value, str) else flow(value)


def _report_problems(settings: StudyFile, tree: Tree) -> Iterator[str]:
    names = [axis.name for axis in settings.axes]
    roles = {key: getattr(settings.report, key) for key in ("compare", "pair", "tune", "fit")}
    for key, name in roles.items():
        where = f"report.{key} ({tree.place(('report', key))}) is {name}"
        if name is not None and name not in names:
            yield f"{where}: no axis is called so; there are {', '.join(names)}"
        elif name is not None and list(roles.values()).count(name) > 1:
            yield f"{where}, and so is another key of report: each axis has one part in it"
    compare, baseline = settings.report.compare, settings.report.baseline
    if baseline is not None and compare in names:
        labels = list(map(label_of, settings.axis(compare).values))
        if baseline not in labels:
            where = tree.place(("report", "baseline"))
            yield f"report.baseline ({where}) is {baseline}: {compare} has {', '.join(labels)}"
