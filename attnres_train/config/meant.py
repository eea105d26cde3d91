"""What the user may have meant: keys under another name or in another form, answered with the
override to write. Nothing is guessed silently: each is an error.
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Collection, Sequence
from typing import NamedTuple

from attnres_train.config.errors import ConfigError
from attnres_train.config.fields import all_keys, as_written, holds_sections, nearest
from attnres_train.config.foreign import NOTES, SWITCHES, keys_for, keys_near, plain
from attnres_train.config.tree import form_problem
from attnres_train.config.yaml_text import KeyPath

_ON, _OFF = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_NUMBER = re.compile(r"-\.?\d.*")
_CONFIG_OPTIONS = ("c", "cfg", "config", "config_file", "config_path", "configuration")


def is_override(word: str) -> bool:
    """Whether a word of the command line has the form ``key.path=value``."""
    return "=" in word.lstrip("=") and not word.startswith("-")


def did_you_mean(path: KeyPath, text: str | None) -> str:
    """``did you mean optimizer.lr=3e-4?`` for the unknown key at ``path``, whose value is ``text``
    as it would be written again (None: a section, or nothing); "" where nothing is like it."""
    name = plain(str(path[-1]))
    on, off = ((text or "true").lower() in words for words in (_ON, _OFF))
    if name in SWITCHES and on:
        overrides = [SWITCHES[name]]
    else:
        shown = None if name in NOTES or (name in SWITCHES and off) else text
        overrides = [_override(key, path, shown) for key in meant(path)]
    if not overrides:
        return ""
    note = f" ({NOTES[name]})" if name in NOTES else ""
    return f"did you mean {' or '.join(overrides)}?{note}"


def meant(path: KeyPath) -> list[str]:
    """The keys, of `all_keys`, that ``path`` may stand for, best first."""
    key = _key(path)
    return exact(path) or nearest(key) or keys_near(key.rpartition(".")[2])


def exact(path: KeyPath) -> list[str]:
    """The keys that have the name of ``path``, with us or elsewhere."""
    key = _key(path)
    if key in all_keys():
        return [key]
    section, _, name = key.rpartition(".")
    same = [guess for guess in nearest(key) if guess.rpartition(".")[2] == name]
    elsewhere = keys_for(name)
    # With a section in front the name is more likely ours: nanoGPT's block_size has none. Unless
    # the section is not: torchtitan's training.steps.
    if section and same:
        return same if not elsewhere or _is_ours(section) else elsewhere
    return [*same, *(k for k in elsewhere if k not in same)]


def _is_ours(section: str) -> bool:
    return any(f".{section}." in f".{key}" for key in all_keys())


def _key(path: KeyPath) -> str:
    return ".".join(plain(step) for step in path if isinstance(step, str))


def _override(key: str, path: KeyPath, text: str | None) -> str:
    written = as_written(key, path)
    return written if text is None or holds_sections(key) else shlex.quote(f"{written}={text}")


class _Item(NamedTuple):
    """A key and its value among the words of a command line, in whatever form."""

    key: str
    value: str | None
    words: Sequence[str]

    @property
    def path(self) -> KeyPath:
        steps = self.key.lstrip("-").strip().split(".")
        return tuple(int(step) if step.isdigit() else step for step in steps)


def check_words(words: Sequence[str], options: Collection[str] = ()) -> list[str]:
    """Raise ConfigError where ``words``, the overrides of a command line, are no ``key.path=value``
    but ``--key=value``, ``--key value``, ``key value`` or ``key: value``, by our names or those of
    other frameworks, and where they are nothing at all. ``options`` are those of the command.

    Returns the words with dashes (``--fast``) that are like nothing known, if that is all.
    """
    problems: list[str] = []
    unknown: list[str] = []
    while words:
        item = _item(words)
        if is_override(words[0]):
            pass  # `load_config` checks the key
        elif problem := _problem(item, options):
            problems.append(problem)
        elif item.key.startswith("-"):
            unknown.append(item.words[0])
        else:
            item = item._replace(words=words[:1])
            problems.append(form_problem(words[0]))
        words = words[len(item.words) :]
    if problems:
        raise ConfigError(problems + [f"{word}: unknown option" for word in unknown])
    return unknown


def _item(words: Sequence[str]) -> _Item:
    """What stands first in ``words``."""
    word, following = words[0], words[1:]
    if "=" in word.lstrip("="):
        key, _, value = word.partition("=")
        return _Item(key, value, words[:1])
    key, colon, value = word.partition(":")
    if colon and value.strip():
        return _Item(key, value.strip(), words[:1])
    if following and following[0] == "=":
        return _Item(key, " ".join(following[1:2]), words[:3])
    if following and _may_be_value(following[0], key):
        return _Item(key, following[0], words[:2])
    return _Item(key, None, words[:1])


def _may_be_value(word: str, of: str) -> bool:
    """Whether ``word`` is the value of the key ``of`` before it, and not the next key."""
    if word.startswith("-"):
        return bool(_NUMBER.fullmatch(word))
    key = word.rstrip(":")
    if plain(of) in SWITCHES and exact((key,)):
        return False
    return not is_override(word) and not ("." in key and key in all_keys())


def _problem(item: _Item, options: Collection[str]) -> str:
    """What is wrong with it and what to write, if its key is known or like one that is."""
    shown, name = shlex.join(item.words), plain(str(item.path[-1]))
    if name in _CONFIG_OPTIONS:
        return f"{shown}: the config stands by itself, without an option"
    if item.value is None and ".".join(map(str, item.path)) in all_keys():
        return f"{shown} has no value: write it as {item.key.lstrip('-')}=VALUE"
    known = exact(item.path)
    if not known and (option := _like(item.key, options)):
        return f"{shown}: did you mean {option}{'' if item.value is None else ' ' + item.value}?"
    question = did_you_mean(item.path, item.value)
    return question and f"{shown}: {question}"


def _like(word: str, options: Collection[str]) -> str | None:
    """The option that ``word`` shortens, extends (``--nproc_per_node``) or misspells."""
    long = [option for option in options if option.startswith("--")]
    for option in long if word.startswith("--") else ():
        if option.startswith(word) or re.match(rf"{option}s?([-_]|$)", word):
            return option
    return next(iter(difflib.get_close_matches(word, long, n=1, cutoff=0.8)), None)
