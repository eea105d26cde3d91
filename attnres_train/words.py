"""Lists in messages."""

from __future__ import annotations

from collections.abc import Iterable


def some_of(names: Iterable[object], most: int = 8) -> str:
    """The first ``most`` of ``names``, and how many more there are: "a, b and 3 more"."""
    names = list(names)
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more
