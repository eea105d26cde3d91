"""Configuration files as trees of plain values that remember where each value was written.

`read_tree` follows ``extends``, `parse_override` reads ``key.path=value``, `Tree.merge` puts one
over the other. What the keys mean is the business of `config.loader`.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attnres_train.config import shipped
from attnres_train.config.errors import ConfigError
from attnres_train.config.paths import expanded
from attnres_train.config.yaml_text import KeyPath, dotted, parse


@dataclass
class Tree:
    """Nested mappings, lists and scalars, and the place each key path was last written at."""

    values: dict[str, Any]
    places: dict[KeyPath, str]
    texts: dict[KeyPath, str] = field(default_factory=dict)
    """Values of the command line as they were typed, to repeat them in messages."""

    def place(self, path: KeyPath) -> str:
        """Where ``path`` stands; else something inside it, else what is around it."""
        if path in self.places:
            return self.places[path]
        inside = [where for key, where in self.places.items() if key[: len(path)] == path]
        return inside[0] if inside else self.place(path[:-1])

    def at(self, path: KeyPath) -> Any:
        """The value at ``path``, which must exist; a name that stands for a section is all that is
        in that section."""
        value: Any = self.values
        for key in path:
            if isinstance(value, str):
                break
            value = value[key]
        return value

    def merge(self, over: Tree) -> None:
        """Put ``over`` on top: mappings are merged key by key, everything else is replaced."""
        replaced = {
            path[:length]: where
            for path, where in over.places.items()
            for length in range(1, len(path))
            if not self._keeps_more(path[:length], path[length])
        }
        self.values = _merged(self.values, over.values)
        # A list that is replaced takes the places of its elements with it.
        kept = {path: where for path, where in self.places.items() if self._has(path)}
        self.places = kept | replaced | over.places
        self.texts |= over.texts

    def _keeps_more(self, path: KeyPath, key: str | int) -> bool:
        """Whether ``path`` is a mapping or a list in which ``key`` alone can change."""
        kinds = dict | list if isinstance(key, int) else dict
        return self._has(path) and isinstance(self.at(path), kinds)

    def _has(self, path: KeyPath) -> bool:
        value: Any = self.values
        try:
            for key in path:
                value = value[key]
        except (KeyError, IndexError, TypeError):
            return False
        return True


def _merged(base: Any, over: Any, path: KeyPath = ()) -> Any:
    if not isinstance(over, dict):
        return over
    if over and all(isinstance(key, int) for key in over) and isinstance(base, list | None):
        return _with_elements(base or [], over, path)
    if isinstance(base, dict):
        merged = {k: _merged(base.get(k), value, (*path, k)) for k, value in over.items()}
        return base | merged
    return {k: _merged(None, value, (*path, k)) for k, value in over.items()}


def _with_elements(base: list[Any], over: dict[Any, Any], path: KeyPath) -> list[Any]:
    """``base`` under an override that names one element: `data.corpus.0.weight=2`, or the next one,
    which is put at its end."""
    elements = list(base)
    for number, value in over.items():
        inner = (*path, number)
        if number > len(elements):
            there = f"{len(elements)} element{'' if len(elements) == 1 else 's'}"
            next_one = dotted((*path, len(elements)))
            raise ConfigError(
                f"{dotted(inner)} (command line): {dotted(path)} has {there}, counted from 0; the "
                f"next one is {next_one}"
            )
        old = elements[number] if number < len(elements) else None
        elements[number : number + 1] = [_merged(old, value, inner)]
    return elements


def parse_override(text: str) -> Tree:
    """A tree of the one value in ``key.path=value``; the value is YAML, an empty one null."""
    key, equals, value_text = text.partition("=")
    path: KeyPath = tuple(int(k) if k.isdigit() else k for k in key.strip().split("."))
    if not equals or "" in path:
        raise ConfigError(form_problem(text))
    value, inner = parse(value_text, lambda _: f"command line, {text!r}")
    places = {(*path, *rest): "command line" for rest in [(), *inner]}
    for name in reversed(path):
        value = {name: value}
    return Tree(value, places, {path: value_text})


def form_problem(text: str) -> str:
    """What is wrong with an override that has no key or no value."""
    return f"override {text!r}: write it as key.path=value, for example train.train_iters=20"


def read_tree(path: Path, wanted_by: str = "", chain: tuple[Path, ...] = ()) -> Tree:
    """The file at ``path`` over the files that it ``extends`` (later ones over earlier ones).

    ``wanted_by`` names the place of the ``extends`` that led here, ``chain`` the files on the way.
    """
    chain = (*chain, path)
    # A link that leads to itself is told when it is read.
    if os.path.realpath(path) in map(os.path.realpath, chain[:-1]):
        circle = " -> ".join(map(str, chain))
        raise ConfigError(f"{wanted_by}extends goes round in a circle: {circle}")
    values, places = parse(_read(path, wanted_by), lambda line: f"{path}:{line}")
    if not isinstance(values, dict | None):
        raise ConfigError(f"{path}: expected a mapping of sections, not {values!r}")
    own = Tree(values or {}, {**places, (): str(path)})
    bases = own.values.pop("extends", [])
    where = own.place(("extends",))
    bases = [bases] if isinstance(bases, str) else bases
    if not (isinstance(bases, list) and all(isinstance(base, str) for base in bases)):
        raise ConfigError(f"extends ({where}): expected a file or a list of files, not {bases!r}")
    tree = Tree({}, {})
    for base in bases:
        try:
            file = shipped.find(expanded(base), beside=path.parent)
        except ValueError as error:
            raise ConfigError(f"extends ({where}) is {base!r}: {error}") from None
        tree.merge(read_tree(file, f"extends ({where}): ", chain))
    tree.merge(own)
    return tree


def _read(path: Path, wanted_by: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{wanted_by}{path} is not a text file (UTF-8)") from None
    except FileNotFoundError:
        raise ConfigError(f"{wanted_by}there is no file {path}{_near_by(path)}") from None
    except OSError as error:
        raise ConfigError(f"{wanted_by}cannot read {path}: {error.strerror}") from None


def _near_by(path: Path) -> str:
    """The configurations beside a missing one, else those in ``configs/``, else the names of those
    that come with the package; most similar first."""
    found = sorted(path.parent.glob("*.y*ml")) or sorted(Path("configs").glob("*.y*ml"))
    where = "near by" if found else "with the package come"
    found = found or [Path(name) for name in shipped.names()]
    found.sort(key=lambda file: -difflib.SequenceMatcher(None, file.stem, path.stem).ratio())
    return f"; {where}: " + ", ".join(map(str, found[:6]))
