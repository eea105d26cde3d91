"""In which keys of their configurations runs differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attnres_train.config.resume_table import TOLD, changes
from attnres_train.config.yaml_text import flow
from attnres_train.reports.reading import Run

_NAMES = ("run.name", "run.dir")  # that these differ is said by the runs' names


@dataclass(frozen=True)
class Difference:
    key: str
    values: list[str]
    """As written in YAML, one per run."""
    matters: bool
    """Whether what is learnt depends on it."""


def differences(runs: Sequence[Run]) -> list[Difference]:
    """Between ``runs``, of which those without a configuration are left blank; what matters
    first."""
    known = [run for run in runs if run.values]
    if len(known) < 2:
        return []
    first, rows = known[0], {}  # key -> (its value in the first, whether it matters)
    own: dict[str, dict[str, str]] = {run.label: {} for run in known}
    for run in known[1:]:
        for change in changes(first.values, run.values):
            if change.key not in _NAMES:
                rows[change.key] = (_text(change.before), change.effect in TOLD)
                own[run.label][change.key] = _text(change.after)
    found = [
        Difference(
            key,
            [own[run.label].get(key, before) if run.values else "" for run in runs],
            matters,
        )
        for key, (before, matters) in rows.items()
    ]
    return sorted(found, key=lambda one: not one.matters)


def _text(value: object) -> str:
    return "" if value is None else flow(value)
