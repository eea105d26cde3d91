"""From YAML files and command-line overrides to a typed `RunConfig`, and back."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from attnres_train.config.errors import ConfigError
from attnres_train.config.fields import locate, nearest, section_at
from attnres_train.config.kinds import KIND_ERROR
from attnres_train.config.schema import RunConfig
from attnres_train.config.tree import Tree, parse_override, read_tree
from attnres_train.config.yaml_text import Dumper, KeyPath, dotted


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read ``path`` and what it extends, then apply ``overrides`` (``key.path=value``) in order.

    Raises ConfigError, which tells of every problem at once: the key, the file and line (or the
    command line) where it stands, and what is expected there.
    """
    tree = read_tree(Path(path))
    for text in overrides:
        tree.merge(parse_override(text))
    try:
        return RunConfig.model_validate(tree.values)
    except ValidationError as error:
        # A union reports each of its branches: keep one problem per key.
        problems = dict(_problem(tree, e) for e in error.errors())
        raise ConfigError(list(problems.values())) from None


def _problem(tree: Tree, error: ErrorDetails) -> tuple[KeyPath, str]:
    path, wanted = locate(error["loc"], tree.values)
    key = dotted(path)
    if error["type"] == "missing" and path == error["loc"]:
        return path, f"{key}: missing from {tree.place(path[:-1])}; expected {wanted}"
    here = f"{key} ({tree.place(path)})"
    if error["type"] == KIND_ERROR:
        return path, f"{here} is {_shown(tree.at(path))}: {error['msg']}"
    if not wanted:
        if guesses := nearest(key):
            return path, f"{here}: unknown key; did you mean {' or '.join(guesses)}?"
        known = ", ".join(section_at(path[:-1], tree.values).model_fields)
        return path, f"{here}: unknown key; known here: {known}"
    return path, f"{here}: expected {wanted}, not {_shown(tree.at(path))}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def save_config(config: RunConfig, path: str | Path) -> None:
    """Write every key with the value in effect; `load_config` of the file gives an equal config."""
    text = yaml.dump(config.model_dump(mode="json"), Dumper=Dumper, sort_keys=False)
    Path(path).write_text(text, encoding="utf-8")


def json_schema() -> dict[str, Any]:
    """JSON schema of a configuration file, for editors that check and complete YAML."""
    schema = RunConfig.model_json_schema()
    schema["properties"]["extends"] = {
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        "description": "File or files, relative to this one, whose values this one changes.",
    }
    # What a file leaves out may stand in the one it extends.
    for section in [schema, *schema["$defs"].values()]:
        section.pop("required", None)
    return schema
