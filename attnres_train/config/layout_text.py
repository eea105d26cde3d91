"""Megatron-LM's pipeline layout string, ``Et*3|(tt|)*2ttL``: which layers form which chunk.

``E`` is the embedding, ``t`` a decoder layer, ``L`` the loss (final norm and head), ``|`` ends a
chunk, ``x*n`` repeats an item and ``(...)*n`` a group; commas and spaces are ignored. Chunks stand
in model order: the ``c``-th is virtual stage ``c // P`` of rank ``c % P``. (Megatron-Core 0.16.1,
`pipeline_parallel_layer_layout.PipelineParallelLayerLayout`, where groups may not be nested.)
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from attnres_train.config.errors import ConfigError

_ITEM = re.compile(r"[\s,]*([EtmL|()])(?:\*(\d+))?[\s,]*")
_LONGEST = 100_000  # items when all is written out; a mistyped count shall not fill the memory


def stated_layers(layout: str | Sequence[int]) -> list[int] | None:
    """Decoder layers per chunk as `parallel.layout` states them; None where they are to be found
    (``even``, ``auto``). Raises ConfigError for a string that cannot be read."""
    if layout in ("even", "auto"):
        return None
    return parse_layout(layout) if isinstance(layout, str) else list(layout)


def parse_layout(text: str) -> list[int]:
    """Decoder layers of each chunk of a layout string, each at least one. Raises ConfigError."""
    items = _unroll(text)
    if "m" in items:
        raise _error(text, "multi-token prediction (m) is not there yet: remove it")
    if not re.fullmatch(r"E[t|]*L", items):
        raise _error(text, "it must begin with the embedding E and end with the loss L, once each")
    chunks = items.split("|")
    for number, chunk in enumerate(chunks, 1):
        if "t" not in chunk:
            only = f"only {chunk}" if chunk else "nothing"
            where = f"chunk {number} of {len(chunks)} holds {only}"
            raise _error(text, f"{where}, but every chunk needs at least one decoder layer (t)")
    return [chunk.count("t") for chunk in chunks]


def _unroll(text: str) -> str:
    """The layout without groups, counts and spaces."""
    groups: list[list[str]] = [[]]  # items of the open groups, the innermost last
    position = 0
    while position < len(text):
        match = _ITEM.match(text, position)
        if match is None:
            raise _misplaced(text, position)
        what, count = match.groups()
        if (what == ")" and len(groups) == 1) or (what == "(" and count):
            raise _misplaced(text, position)
        position = match.end()
        if what == "(":
            groups.append([])
            continue
        item = "".join(groups.pop()) if what == ")" else what
        if len(item) * int(count or 1) > _LONGEST:
            raise _error(text, f"a count of {count} makes more than {_LONGEST:,} items")
        groups[-1].append(item * int(count or 1))
    if len(groups) > 1:
        raise _error(text, "a parenthesis is not closed")
    return "".join(groups[0])


def _misplaced(text: str, position: int) -> ConfigError:
    return _error(
        text,
        f"cannot read {text[position]!r} at character {position + 1}; write even, auto, a list "
        "with one count of layers per chunk, or Megatron's layout string, e.g. Et*3|(tt|)*2ttL",
    )


def _error(text: str, what: str) -> ConfigError:
    return ConfigError(f"parallel.layout '{text}': {what}")
