"""Paths as they are written in a configuration: one rule for all of them."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable
from typing import Any

from pydantic import field_validator
from pydantic_core import PydanticCustomError

TOLD_AS_IT_IS = "kind"
"""Type of the validation errors whose message is told as it is (`kind_fields.KIND_ERROR`)."""
MOST_BYTES = 255
"""Of the name of a file or a folder, on all usual file systems."""
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


def expanded(path: str) -> str:
    """``path`` with ``~``, ``~user``, ``$NAME`` and ``${NAME}`` as a shell takes them. A file whose
    name has them is taken as it is.

    Raises ValueError where there is no such variable or user, since a folder of that name is not
    meant, and for what can be no path.
    """
    if "\0" in path:
        raise ValueError("no path can hold a NUL")
    if not ("$" in path or path.startswith("~")):
        return path
    full = os.path.expanduser(os.path.expandvars(path))
    if full == path and os.path.lexists(path):
        return path
    missing = [a or b for a, b in _VARIABLE.findall(path) if (a or b) not in os.environ]
    if missing:
        raise ValueError(f"the environment has no variable {missing[0]}")
    if full.startswith("~") and not os.path.lexists(full):
        raise ValueError(f"there is no user {full.partition('/')[0][1:] or 'with a home'}")
    return full


def holding_paths(*fields: str) -> Any:
    """A validator of a section whose ``fields`` are paths, lists of paths or null."""

    def expand(value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, list):
            return [expanded(path) for path in value]
        return None if value is None else expanded(value)

    return field_validator(*fields)(_told_as_it_is(expand))


def holding_names(*fields: str) -> Any:
    """A validator of a section whose ``fields`` name folders below another one."""
    return field_validator(*fields)(_told_as_it_is(folder_name))


def _told_as_it_is(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``check``, whose ValueErrors say all that there is to say."""

    def checked(value: Any) -> Any:
        try:
            return check(value)
        except ValueError as error:
            raise PydanticCustomError(TOLD_AS_IT_IS, "{told}", {"told": str(error)}) from None

    return checked


def folder_name(name: str) -> str:
    """``name``, which may be that of a folder in another: ``sweep/first``.

    Raises ValueError where no folder, or one elsewhere, can have it.
    """
    for character in name:
        if unicodedata.category(character) == "Cc":
            raise ValueError(f"a folder's name cannot hold the character U+{ord(character):04X}")
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise ValueError('a folder below run.dir has no "/" at an end, nor "." or ".." in its name')
    if any(len(part.encode()) > MOST_BYTES for part in name.split("/")):
        raise ValueError(f"a folder's name cannot be longer than {MOST_BYTES} bytes")
    return name
