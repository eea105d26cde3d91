"""How the words of a command line are read."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any


class CommandParser(argparse.ArgumentParser):
    """Parses one command. Where that has a list of words (`takes_words`), everything on the line
    that is no option of the command goes there, in order: argparse alone would tear ``--lr 3e-4``
    apart, and would not take KEY=VALUE after an option."""

    def __init__(self, **settings: Any) -> None:
        self.options: set[str] = set()
        self.valued: set[str] = set()
        """Those of them that a value follows."""
        self.named: list[str] = []
        """What stands before the words, e.g. CONFIG."""
        self.words: str | None = None
        # Nothing is guessed: --n is not --nproc.
        super().__init__(**settings, allow_abbrev=False)

    def _add_action(self, action: Any) -> Any:
        # Not add_argument, which knows nothing of the options of a group.
        action = super()._add_action(action)
        self.options.update(action.option_strings)
        if action.nargs != 0:
            self.valued.update(action.option_strings)
        if not action.option_strings and action.dest != self.words:
            self.named.append(action.dest)
        return action

    def takes_words(self, dest: str, metavar: str, text: str) -> None:
        self.words = dest
        self.add_argument(dest, metavar=metavar, nargs="*", help=text)

    def parse_known_args(  # type: ignore[override]  # one of its overloads is all that is called
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        if self.words is None or args is None:
            return super().parse_known_args(args, namespace)
        # To argparse, what begins with a blank is no option.
        shown = [
            f" {word}" if self._is_foreign(word) and before not in self.valued else word
            for before, word in zip(["", *args], args, strict=False)
        ]
        found, rest = super().parse_known_args(shown, namespace)
        words = [*getattr(found, self.words), *rest]
        setattr(found, self.words, [_unhidden(word) for word in words])
        for dest in self.named:
            setattr(found, dest, _unhidden(getattr(found, dest)))
        return found, []

    def _is_foreign(self, word: str) -> bool:
        option = word.startswith("-") and word not in ("-", "--") and not re.match(r"-\.?\d", word)
        return option and word.partition("=")[0] not in self.options


def _unhidden(word: str) -> str:
    return word[1:] if word.startswith(" -") else word


def check_overrides(args: argparse.Namespace) -> None:
    """Raise UserError, or end with the usage, where overrides are not KEY=VALUE."""
    parser: CommandParser = args.parser
    named = [getattr(args, dest) for dest in parser.named]
    words = args.overrides
    if any(name.startswith("-") for name in named):
        # An option before CONFIG stands in its place.
        config = re.compile(r"[^-].*\.ya?ml")
        words = [word for word in named + words if not config.fullmatch(word)]
    if all("=" in word.lstrip("=") and not word.startswith("-") for word in words):
        return
    from attnres_train.config.meant import check_words  # loads the schema

    if unknown := check_words(words, parser.options):
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
