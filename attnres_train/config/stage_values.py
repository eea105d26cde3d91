"""Stages as plain values of a configuration: the keys outside of `stages` are the base, each stage
says what is other in it. `completed` makes every stage whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from attnres_train.config.section import Section
from attnres_train.config.stage_schema import StageConfig
from attnres_train.config.yaml_text import KeyPath

_WHOLE = ("lr_schedule",)
"""Sections that a stage replaces, where it has one."""
SECTIONS = [name for name in StageConfig.model_fields if name != "name"]


def completed(values: dict[str, Any]) -> dict[str, Any]:
    """Plain ``values`` of a configuration with every stage whole, and the first one on top. What is
    no list of mappings is left as it is."""
    stages = values.get("stages")
    if not _are_mappings(stages):
        return values
    whole = [_laid_over(_inherited(values, number), s) for number, s in enumerate(stages)]
    return stage_values({**values, "stages": whole}, 0) | {"stages": whole}


def _are_mappings(stages: Any) -> TypeGuard[list[dict[str, Any]]]:
    return (
        isinstance(stages, list) and bool(stages) and all(isinstance(one, dict) for one in stages)
    )


def _inherited(values: dict[str, Any], number: int) -> dict[str, Any]:
    """What stage ``number`` has where it says nothing."""
    found = _settable(StageConfig, values)
    schedule = found.get("lr_schedule")
    if number and isinstance(schedule, dict):
        found["lr_schedule"] = {k: v for k, v in schedule.items() if k != "warmup_iters"}
    return found


def _settable(section: type[Section], values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``values`` that are keys of ``section`` and the sections in it."""
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        inner, value = field.annotation, values.get(name)
        if isinstance(value, dict) and _is_section(inner):
            found[name] = _settable(inner, value)
        elif name in values:
            found[name] = value
    return found


def _is_section(annotation: Any) -> TypeGuard[type[Section]]:
    return (
        isinstance(annotation, type)
        and issubclass(annotation, Section)
        and bool(annotation.model_fields)
    )


def _laid_over(base: Any, over: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    return base | {
        name: value if name in _WHOLE else _laid_over(base.get(name), value)
        for name, value in over.items()
    }


def stage_values(values: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Plain ``values`` of a configuration as they are in stage ``number``, without `stages`. Where
    there are none, the run is its first."""
    base = {name: value for name, value in values.items() if name != "stages"}
    stages = values.get("stages") or [{}]
    own = {name: value for name, value in stages[number].items() if name in SECTIONS}
    stage: dict[str, Any] = _laid_over(base, own)
    return stage


def place_of(path: KeyPath, values: Any) -> KeyPath:
    """Where the value of ``path`` stands in ``values``, as they were before `completed`."""
    if len(path) > 2 and path[0] == "stages" and not _has(values, path):
        return path[2:]
    if path[:1] != ("stages",) and not _has(values, path):
        first: KeyPath = ("stages", 0, *path)
        return first if _has(values, first) else path
    return path


def _has(values: Any, path: KeyPath) -> bool:
    for key in path:
        if isinstance(values, dict):
            if key not in values:
                return False
        elif not (isinstance(values, list) and isinstance(key, int) and key < len(values)):
            return False
        values = values[key]
    return True


def hidden(values: Mapping[str, Any], path: KeyPath) -> bool:
    """Whether no stage reads the value at ``path``, since each has one of its own."""
    stages = values.get("stages")
    return _are_mappings(stages) and all(_sets(stage, path) for stage in stages)


def _sets(stage: Any, path: KeyPath) -> bool:
    for key in path:
        if not isinstance(stage, dict):
            return True
        if key not in stage:
            return False
        if key in _WHOLE:
            return True
        stage = stage[key]
    return True


def keys() -> list[str]:
    """The keys, as outside of `stages`, that a stage may have of its own; list elements without
    their index."""
    return list(_keys(StageConfig, ""))[1:]  # not `name`


def _keys(section: type[Section], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        if _is_section(field.annotation):
            yield from _keys(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name
