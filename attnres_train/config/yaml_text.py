"""Reading and writing YAML text: plain scalars by YAML 1.2's rules, the line of every value, no
repeated keys."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import yaml

from attnres_train.config.errors import ConfigError

KeyPath = tuple[str | int, ...]


def dotted(path: KeyPath) -> str:
    """The path as it is written on the command line: ``data.corpus.0.path``."""
    return ".".join(map(str, path))


class _Loader(yaml.SafeLoader):
    """Reads plain scalars by YAML 1.2's rules: ``1e-3`` is a number, ``off``, ``0123`` and
    ``2026-01-31`` are text. (PyYAML's own rules, YAML 1.1, see it the other way round.)"""

    yaml_implicit_resolvers = {}  # noqa: RUF012  (typed in the stubs, and not as a ClassVar)


_PLAIN_SCALARS = {
    "bool": r"true|True|TRUE|false|False|FALSE",
    "null": r"~|null|Null|NULL|",
    # `0123` is neither integer nor float: it is somebody's run name.
    "int": r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+",
    "float": r"[-+]?(?:(?:0|[1-9][0-9_]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
}


class _Dumper(yaml.SafeDumper):
    """Quotes the text that readers of YAML 1.1 or 1.2 would take for something else. A text or a
    list of scalars takes one line."""


def _list_node(dumper: _Dumper, values: list[Any]) -> yaml.Node:
    short = not any(isinstance(value, (dict, list)) for value in values)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=short or None)


def _text_node(dumper: _Dumper, text: str) -> yaml.Node:
    # In other styles an end of line in the text is one in the file.
    style = '"' if len(text.splitlines()) > 1 else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(list, _list_node)
_Dumper.add_representer(str, _text_node)

for _kind, _pattern in _PLAIN_SCALARS.items():
    for _reader_or_writer in (_Loader, _Dumper):
        _reader_or_writer.add_implicit_resolver(
            f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_pattern})\Z"), None
        )


def block(value: Any) -> str:
    """``value``, plain mappings, lists and scalars, as the lines of a YAML file."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=math.inf)


def flow(value: Any) -> str:
    """A scalar or a list as it is written within a line."""
    if isinstance(value, float):
        return repr(value)  # 1e-05, where YAML 1.1 has 1.0e-05
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=math.inf)
    return text.strip().removesuffix("...").strip()


def parse(text: str, place: Callable[[int], str]) -> tuple[Any, dict[KeyPath, str]]:
    """The value of a YAML text and the place of everything in it; ``place`` words a line number.

    Raises ConfigError on a syntax error, a repeated key and a key that is not a word.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        places: dict[KeyPath, str] = {}
        value = None if node is None else _build(loader, node, (), places, place)
    except RecursionError:
        raise ConfigError(f"{place(1)}: an anchor that contains itself") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        told = f"{error.problem}{_to_quote(text.splitlines()[line - 1 : line])}"
        raise ConfigError(f"{place(line)}: not valid YAML: {told}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{place(1)}: not valid YAML: {error}") from None
    return value, places


_NEEDS_QUOTES = re.compile(
    r"""(?:^|[:,\[{-])\s*([*&!%@`][^\s,\]}]*|[^\s,:'"]*\$\{\w*\}[^\s,}\]]*)"""
)


def _to_quote(lines: list[str]) -> str:
    """What to quote in the line where YAML's grammar was hurt, if there is such a value."""
    for found in map(_NEEDS_QUOTES.search, lines):
        if found:
            return f"""; a value like this has to be in quotes: "{found[1]}\""""
    return ""


def _build(
    loader: _Loader,
    node: yaml.Node,
    path: KeyPath,
    places: dict[KeyPath, str],
    place: Callable[[int], str],
) -> Any:
    places.setdefault(path, place(node.start_mark.line + 1))
    if isinstance(node, yaml.SequenceNode):
        return [
            _build(loader, item, (*path, i), places, place) for i, item in enumerate(node.value)
        ]
    if isinstance(node, yaml.ScalarNode):
        return loader.construct_object(node)
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        here = place(key_node.start_mark.line + 1)
        key = loader.construct_object(key_node, deep=True)
        inner = (*path, key)
        if not isinstance(key, str):
            raise ConfigError(f"{here}: a key must be a word, not {key!r}")
        if key == "<<":
            raise ConfigError(
                f"{dotted(inner)} ({here}): merge keys are not read: write the values here, or "
                "those that files share into one file that the others name by `extends`"
            )
        if key in values:
            first = places[inner]
            raise ConfigError(f"{dotted(inner)} ({here}): written twice, first at {first}")
        places[inner] = here
        values[key] = _build(loader, value_node, inner, places, place)
    return values
