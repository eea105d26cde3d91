"""The schema seen from the user's side: which keys there are, which is meant, what each expects."""

from __future__ import annotations

import difflib
import functools
import types
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeGuard, Union, get_args, get_origin

from attnres_train.config.kind_fields import KindName, OptionsOf, options_class
from attnres_train.config.schema import RunConfig
from attnres_train.config.section import Section
from attnres_train.config.yaml_text import KeyPath, dotted

EXTENDS = "File or files, relative to this one, whose values this one changes."
"""What the one key of a file means that is none of the configuration."""
_BOUNDS = {"ge": "of at least", "gt": "above", "le": "of at most", "lt": "below"}
_PLURALS = {int: "integers", float: "numbers", str: "texts", Any: "values"}
_MAPPED = {Any: "values", dict: "mappings"}


def is_section(annotation: Any) -> TypeGuard[type[Section]]:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def inner_section(annotation: Any) -> type[Section] | None:
    """The section that a field holds, or holds a list of; None for any other field."""
    return next(filter(is_section, [annotation, *get_args(annotation)]), None)


@functools.cache
def all_keys() -> tuple[str, ...]:
    """Every key path of the schema, sections too, list elements without their index."""
    return tuple(dotted(path) for path in _walk(RunConfig, ()))


def _walk(section: type[Section], path: KeyPath) -> Iterator[KeyPath]:
    for name, field in section.model_fields.items():
        yield (*path, name)
        if inner := inner_section(field.annotation):
            yield from _walk(inner, (*path, name))


def holds_sections(key: str) -> bool:
    """Whether ``key``, one of `all_keys`, names a section or a list of them."""
    return any(other.startswith(f"{key}.") for other in all_keys())


def as_written(key: str, like: KeyPath = ()) -> str:
    """``key``, one of `all_keys`, as it is written on the command line: after the name of each list
    with the index of an element, that of ``like`` where it goes the same way, else 0."""
    path: list[str | int] = []
    annotation: Any = RunConfig
    for name in key.split("."):
        if get_origin(annotation) is list:
            same_way = list(like[: len(path)]) == path and len(like) > len(path)
            path.append(like[len(path)] if same_way and isinstance(like[len(path)], int) else 0)
        path.append(name)
        section = inner_section(annotation)
        assert section is not None, key
        annotation = section.model_fields[name].annotation
    return dotted(tuple(path))


def nearest(key: str) -> list[str]:
    """Up to three keys that ``key`` may have meant, in its own section or any other; best first."""
    parent, _, name = key.rpartition(".")

    def likeness(candidate: str) -> float:
        other_parent, _, other = candidate.rpartition(".")
        names = difflib.SequenceMatcher(None, name, other).ratio()
        if names < 0.6:
            return 0
        return names + 0.2 * difflib.SequenceMatcher(None, parent, other_parent).ratio()

    # A key of a stage is meant where one is asked for.
    alike = [k for k in all_keys() if k.startswith("stages.") == key.startswith("stages.")]
    ranked = sorted(((likeness(k), k) for k in alike), reverse=True)
    best = ranked[0][0]
    return [k for score, k in ranked[:3] if score > 0 and score >= best - 0.1]


def locate(
    location: tuple[str | int, ...], values: Any, root: type[Section] = RunConfig
) -> tuple[KeyPath, str]:
    """The key path of a pydantic error location (without the branches of unions that pydantic
    appends), and what is expected there. An unknown key expects nothing (""). ``values`` are those
    of the whole configuration, of type ``root``, whose kinds say which options there are."""
    annotation: Any = root
    bounds: list[Any] = []
    path: KeyPath = ()
    for step in location:
        if is_section(annotation):
            field = annotation.model_fields.get(str(step))
            if field is None:
                return (*path, step), ""
            options = _options_type(annotation, str(step), values)
            annotation, bounds = options or field.annotation, field.metadata
        elif isinstance(step, int) and get_origin(annotation) is list:
            annotation, bounds = get_args(annotation)[0], []
        else:
            break
        path = (*path, step)
        values = _inside(values, step)
    return path, expected(annotation, bounds)


def _inside(values: Any, key: str | int) -> Any:
    """``values[key]``, None where nothing is there. A name that stands for a section (as in
    `log.observers`) is its ``kind``."""
    if isinstance(values, str) and key == "kind":
        return values
    if isinstance(values, dict):
        return values.get(key)
    return values[key] if isinstance(values, list) and isinstance(key, int) else None


def _options_type(section: type[Section], name: str, values: Any) -> type[Section] | None:
    """The options of the kind that ``values``, plain ones of ``section``, name, if they are what
    field ``name`` holds; None for any other field."""
    fields = section.model_fields
    for note in fields[name].metadata:
        if isinstance(note, OptionsOf):
            kind = _inside(values, note.by) or fields[note.by].default
            # Without a kind there are none: that it is missing is a problem of its own.
            return options_class(note.choice, kind) if isinstance(kind, str) else None
    return None


def given_options(path: KeyPath, values: Any) -> Any:
    """The options in ``values``, as in `locate`, of the kind that ``path`` names; None if none."""
    for name, field in section_at(path[:-1], values).model_fields.items():
        if any(isinstance(note, OptionsOf) and note.by == path[-1] for note in field.metadata):
            return functools.reduce(_inside, (*path[:-1], name), values)
    return None


def section_at(path: KeyPath, values: Any) -> type[Section]:
    """The section whose keys follow ``path``, which must lead to one; ``values`` as in `locate`."""
    section: Any = RunConfig
    for step in path:
        if not isinstance(step, int):
            field = section.model_fields[step]
            annotation = _options_type(section, step, values) or field.annotation
            section = annotation if is_section(annotation) else get_args(annotation)[0]
        values = _inside(values, step)
    return section


def expected(annotation: Any, bounds: Sequence[Any] = ()) -> str:
    """What a value must be, in words: ``an integer of at least 1, or null``."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(expected(arg, bounds) for arg in args)
    if origin is dict:
        return f"a mapping of names to {_MAPPED.get(get_origin(args[1]) or args[1], 'ids')}"
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(map(str, args))
    if origin in (list, tuple):
        some = f"{len(args)} " if origin is tuple else ""
        filled = "non-empty " if bounds else ""
        words = _PLURALS.get(args[0]) or ", ".join(map(str, get_args(args[0]))) or "sections"
        return f"a {filled}list of {some}{words}"
    if any(isinstance(note, OptionsOf) for note in bounds):
        return "a section with the options that the kind declares"
    if is_section(annotation):
        return "a section with the keys " + ", ".join(annotation.model_fields)
    if annotation is type(None):
        return "null"
    for note in bounds:
        if isinstance(note, KindName):
            return note.expected
    if annotation is str:
        return "non-empty text" if bounds else "text"
    if annotation is bool:
        return "true or false"
    limits = [
        f"{words} {getattr(bound, name):g}"
        for bound in bounds
        for name, words in _BOUNDS.items()
        if hasattr(bound, name)
    ]
    number = "an integer" if annotation is int else "a number"
    return " ".join([number, " and ".join(limits).replace(" and of ", " and ")]).strip()
