"""From YAML files and command-line overrides to a typed `RunConfig`, and back."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from attnres_train.config import shipped
from attnres_train.config.errors import ConfigError
from attnres_train.config.fields import (
    EXTENDS,
    all_keys,
    given_options,
    holds_sections,
    locate,
    section_at,
)
from attnres_train.config.kind_fields import KIND_ERROR
from attnres_train.config.meant import did_you_mean
from attnres_train.config.renamed import drop_unset, instead
from attnres_train.config.schema import RunConfig
from attnres_train.config.secrets import without_secrets
from attnres_train.config.stage_values import completed, hidden, keys, place_of
from attnres_train.config.tree import Tree, parse_override, read_tree
from attnres_train.config.yaml_text import KeyPath, block, dotted, flow, parse


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read ``path``, a file or the name of a configuration that comes with the package, and what it
    extends, then apply ``overrides`` (``key.path=value``) in order.

    Raises ConfigError, which tells of every problem at once: the key, the file and line (or the
    command line) where it stands, and what is expected there.
    """
    return load_with_places(path, overrides)[0]


def load_with_places(
    path: str | Path, overrides: Iterable[str] = ()
) -> tuple[RunConfig, dict[KeyPath, str]]:
    """The same, and where each key that is not left at its default was written: ``FILE:LINE`` or
    ``command line``."""
    tree = read_tree(shipped.find(path))
    config = config_of(tree, overrides)
    # What stands outside of `stages` is the first stage's.
    alone = {"stages": (tree.values.get("stages") or [])[:1]}
    base = {path: where for path, where in tree.places.items() if not hidden(alone, path)}
    first = {path[2:]: where for path, where in base.items() if path[:2] == ("stages", 0)}
    return config, base | {path: where for path, where in first.items() if path}


def config_of(tree: Tree, overrides: Iterable[str] = ()) -> RunConfig:
    """The configuration with the values of ``tree``, once ``overrides`` are merged into it. Raises
    ConfigError."""
    unread = []
    for text in overrides:
        override = parse_override(text)
        tree.merge(override)
        (path,) = override.texts
        if path[0] != "stages" and hidden(tree.values, path):
            unread.append(
                f"{dotted(path)} (command line): every stage has its own, so that none would read "
                f"it: write stages.0.{text}, and so on"
            )
    if unread:
        raise ConfigError(unread)
    drop_unset(tree.values)
    try:
        return RunConfig.model_validate(tree.values)
    except ValidationError as error:
        # A union reports each of its branches: keep one problem per key.
        problems = dict(_problem(tree, e) for e in error.errors())
        raise ConfigError(list(problems.values())) from None


def _problem(tree: Tree, error: ErrorDetails) -> tuple[KeyPath, str]:
    located, wanted = locate(error["loc"], completed(tree.values))
    is_missing = error["type"] == "missing" and located == error["loc"]
    path = place_of(located, tree.values)
    if is_missing:  # from a section that is there
        path = (*place_of(located[:-1], tree.values), located[-1])
    key = dotted(path)
    if is_missing:
        return path, f"{key}: missing from {tree.place(path[:-1])}; expected {wanted}"
    here = f"{key} ({tree.place(path)})"
    if error["type"] == KIND_ERROR:
        options = given_options(path, tree.values)
        which = f"{_shown(tree.at(path))}{f' with options {_shown(options)}' if options else ''}"
        return path, f"{here} is {which}: {error['msg']}"
    if not wanted:
        if told := instead(path):
            return path, f"{here}: {told}"
        return path, f"{here}: unknown key; {_instead(tree, path)}"
    return path, f"{here}: expected {wanted}, not {_shown(tree.at(path))}"


def _instead(tree: Tree, path: KeyPath) -> str:
    """What to write instead of the unknown key at ``path``."""
    *outer, name = path
    if outer[:1] == ["stages"] and (key := dotted(path[2:])) in all_keys():
        return (
            f"{key} is the same in all stages: write it outside of `stages`. A stage may have its "
            f"own {', '.join(keys())}"
        )
    known = list(section_at(tuple(outer), tree.values).model_fields)
    section = dotted(tuple(step for step in outer if isinstance(step, str)))
    if not section or holds_sections(section):
        meant = did_you_mean(path, _text(tree, path))
    else:  # the options of a kind, which the schema does not know
        near = difflib.get_close_matches(str(name), known, n=1)
        meant = f"did you mean {dotted((*outer, *near))}?" if near else ""
    return meant or f"known here: {', '.join(known) or 'nothing'}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _text(tree: Tree, path: KeyPath) -> str | None:
    """The value at ``path`` as the user would write it again; None for a section or nothing."""
    value = tree.at(path)
    if value is None or isinstance(value, dict):
        return None
    return tree.texts.get(path) or flow(value)


def plain_values(config: RunConfig) -> dict[str, Any]:
    """Every key with the value in effect, as JSON has it, for files and logs: without secrets."""
    values: dict[str, Any] = without_secrets(config.model_dump(mode="json"))
    return values


def save_config(config: RunConfig, path: str | Path) -> None:
    """Write every key with the value in effect; `load_config` of the file gives an equal config."""
    Path(path).write_text(as_yaml(config), encoding="utf-8")


def as_yaml(config: RunConfig, places: Mapping[KeyPath, str] | None = None) -> str:
    """Every key with the value in effect, as the text of a configuration file. A comment tells
    where a value was written, if ``places`` (of `load_with_places`) has it and it is no default."""
    text = block(plain_values(config))
    if not places:
        return text
    lines = text.splitlines()
    tree = Tree(*parse(text, str))
    commented = set()
    for path, number in tree.places.items():
        line = int(number) - 1
        # A value stands whole on the line of its key, and so does what is inside a list.
        if path in places and line not in commented and _is_leaf(tree.at(path)):
            commented.add(line)
            lines[line] = f"{lines[line]:<46}  # {places[path]}"
    return "\n".join(lines) + "\n"


def _is_leaf(value: Any) -> bool:
    if isinstance(value, dict):
        return not value
    return not (isinstance(value, list) and any(isinstance(item, dict) for item in value))


def json_schema() -> dict[str, Any]:
    """JSON schema of a configuration file, for editors that check and complete YAML."""
    schema = RunConfig.model_json_schema()
    schema["properties"]["extends"] = {
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        "description": EXTENDS,
    }
    # What a file leaves out may stand in the one it extends.
    for section in [schema, *schema["$defs"].values()]:
        section.pop("required", None)
    return schema
