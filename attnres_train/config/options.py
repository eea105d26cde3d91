"""The options of a configuration, for people: every key with type, default and meaning, in the
order of the YAML, and those with some words. All of it is read from the schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_origin

from pydantic.fields import FieldInfo

from attnres_train.config.errors import ConfigError
from attnres_train.config.fields import EXTENDS, expected, inner_section
from attnres_train.config.foreign import plain, words_for
from attnres_train.config.kind_fields import KindName
from attnres_train.config.kinds import CHOICES, resolve
from attnres_train.config.schema import RunConfig
from attnres_train.config.section import Section


@dataclass(frozen=True)
class Option:
    """A key that holds a value. Elements of a list are written ``data.corpus[]``."""

    key: str
    type: str
    default: str | None
    """As it is written in YAML; None where the key must be given."""
    meaning: str
    kinds: tuple[tuple[str, str], ...] = ()
    """Where the key names a kind: ours, each with a sentence."""
    is_kind: bool = False

    @property
    def summary(self) -> str:
        """Type and default."""
        default = "required" if self.default is None else f"default {self.default}"
        return f"{self.type}; {default}"

    @property
    def searched(self) -> str:
        """Everything that a search looks at."""
        kinds = [f"{name} {text}" for name, text in self.kinds]
        key = self.key.replace("[]", "")
        text = " ".join([key, self.summary, self.meaning, *kinds, *self.elsewhere])
        return text.replace("-", "_").lower()

    @property
    def elsewhere(self) -> list[str]:
        """What other frameworks call it."""
        return words_for(self.key)

    @property
    def names(self) -> set[str]:
        """What it is called, here and elsewhere."""
        return {self.key, self.key.rpartition(".")[2], *self.elsewhere}


@dataclass(frozen=True)
class Group:
    """The options of one section."""

    key: str
    """Of the section; "" for the file itself."""
    meaning: str
    options: tuple[Option, ...]


def groups() -> list[Group]:
    """Every option, by section."""
    extends = Option("extends", "text or a list of texts", "[]", EXTENDS)
    own, *sections = _groups(RunConfig, "", "")
    top = Group("", "A configuration is a YAML file of sections.", (extends, *own.options))
    return [top, *sections]


def _groups(section: type[Section], key: str, meaning: str) -> Iterator[Group]:
    """Of ``section`` and, after it, of the sections in it."""
    prefix = f"{key}." if key else ""
    inner: list[Group] = []
    own: list[Option] = []
    for name, field in section.model_fields.items():
        text = _one_line(field.description or "")
        below = inner_section(field.annotation)
        is_list = get_origin(field.annotation) is list
        if below is None or is_list or not below.model_fields:
            own.append(_option(prefix + name, field, text))
        if below is not None and below.model_fields:
            inner += _groups(below, prefix + name + ("[]" if is_list else ""), text)
    if own:
        yield Group(key, meaning, tuple(own))
    yield from inner


def _option(key: str, field: FieldInfo, meaning: str) -> Option:
    words = expected(field.annotation, field.metadata)
    kind = next((note.choice for note in field.metadata if isinstance(note, KindName)), None)
    kinds = [] if kind is None else [(name, _about(kind, name)) for name in CHOICES[kind].built_in]
    return Option(
        key=key,
        type="kind" if kind else re.sub(r"^an? ", "", words),
        default=_default(key, field),
        meaning=meaning,
        kinds=tuple(kinds),
        is_kind=kind is not None,
    )


def _about(choice: str, name: str) -> str:
    """The first sentence of what a kind of ours says of itself."""
    try:
        text = resolve(choice, name).about()
    except ConfigError:
        return "(cannot be imported)"
    return re.split(r"(?<=[.!?]) +(?=[A-Z`])", text)[0]


def _default(key: str, field: FieldInfo) -> str | None:
    if key.startswith("stages[].") and ".lr_schedule." not in key and key != "stages[].name":
        return "as outside of stages"
    if field.is_required():
        return None
    value = field.get_default(call_default_factory=True)
    if isinstance(value, str):
        return value
    return json.dumps(value, default=lambda section: section.model_dump(exclude_unset=True))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def search(words: Sequence[str]) -> list[Option]:
    """The options in which every word stands, in whatever case, in key, meaning, type, kinds or
    among the words of other frameworks; those that are called so by name come first.

    A word is found where one begins with it (``ep`` in ``epsilon``, not in ``step``), and only if
    nothing is so found, anywhere.
    """
    options = [option for group in groups() for option in group.options]
    wanted = [_searchable(word) for word in words]
    for boundary in (r"(?<![a-z0-9])", ""):
        patterns = [re.compile(boundary + re.escape(word)) for word in wanted]
        found = [o for o in options if all(p.search(o.searched) for p in patterns)]
        # A key of a stage is found where it is asked for, or where nothing else is.
        found = [o for o in found if not o.key.startswith("stages[].")] or found
        if found:
            return sorted(found, key=lambda option: _distance(option, set(wanted)))
    return []


def _distance(option: Option, wanted: set[str]) -> int:
    """0 where a word is the option's own name, 1 where it is another framework's."""
    own = _searchable(option.key.rpartition(".")[2])
    return 0 if own in wanted else 1 if option.names & wanted else 2


def _searchable(word: str) -> str:
    """``--data.corpus.0.path=x`` -> ``data.corpus.path``"""
    return re.sub(r"\[\d*\]|\.\d+(?=\.|$)", "", plain(word.partition("=")[0]))
