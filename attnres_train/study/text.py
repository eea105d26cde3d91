"""The report of a study for a screen."""

from __future__ import annotations

from collections.abc import Iterator

from attnres_train.planning.text import table
from attnres_train.study.analysis import Analysis, Group
from attnres_train.study.scaling import scalings
from attnres_train.study.tables import (
    Table,
    cost,
    course,
    differences,
    edges,
    headline,
    laws,
    means,
)


def as_text(analysis: Analysis) -> str:
    parts: list[Table | str] = [headline(analysis)]
    for group in analysis.groups:
        parts += _group(analysis, group)
    parts += [laws(analysis, one) for one in scalings(analysis)]
    return "\n\n".join(part if isinstance(part, str) else table(*part) for part in parts)


def _group(analysis: Analysis, group: Group) -> Iterator[Table | str]:
    if (found := means(analysis, group)) is None:
        return
    yield found
    yield from edges(analysis, group)
    yield from differences(analysis, group)
    for comparison in group.tuned:
        yield course(analysis, group, comparison)
    yield cost(analysis, group)
