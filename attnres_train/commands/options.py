"""`attnres-train options`: every option of a configuration, or those with some words; and, from the
same, docs/options.md."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence

from attnres_train.commands.output import show
from attnres_train.config.fields import as_written
from attnres_train.config.meant import meant
from attnres_train.config.options import Group, Option, groups, search
from attnres_train.errors import UserError

OWN = "module:Name"
_HEAD = """\
# Options

<!-- Written by `attnres-train options --markdown > docs/options.md`; a test keeps it in step. -->

Every option of a configuration with its type, default and meaning, in the order of the YAML. The
option `train.seq_length` is the key `seq_length` of the section `train` in a file, and
`train.seq_length=2048` on the command line, where an element of a list is written with its number:
`data.corpus.0.weight=2`.

`attnres-train options WORD ...` searches this page, by the words of other frameworks too
(`learning_rate`, `tp`). `attnres-train config CONFIG` prints every option with the value that it
has in a run, and where that was written."""


def run(args: argparse.Namespace) -> int:
    """Returns 1 where no option has the words, else 0."""
    if args.markdown:
        if args.words:
            raise UserError("options --markdown prints all: leave the words out")
        show(as_markdown(groups()))
        return 0
    width = min(100, shutil.get_terminal_size().columns)
    if not args.words:
        show("\n\n".join(_group_text(group, width) for group in groups()))
        return 0
    found = search(args.words)
    if not found:
        print(_nothing(args.words), file=sys.stderr)
        return 1
    show("\n".join(as_text(option, width) for option in found))
    return 0


def _nothing(words: Sequence[str]) -> str:
    near = [as_written(key) for word in words for key in meant((word,))]
    told = f"no option has {' and '.join(words)} in its name or meaning"
    if near:
        return f"{told}; nearest: {', '.join(dict.fromkeys(near))}"
    return f"{told}; `attnres-train options` prints all"


def as_text(option: Option, width: int) -> str:
    """For a terminal of ``width`` columns."""
    lines = [option.key]
    lines += _wrapped(option.summary, width, 4)
    lines += _wrapped(option.meaning, width, 4)
    for name, text in option.kinds:
        lines += _wrapped(f"{name}: {text}", width, 6)
    if option.is_kind:
        lines += _wrapped(f"{OWN} of your own (docs/extending.md)", width, 6)
    if option.elsewhere:
        lines += _wrapped(f"elsewhere: {', '.join(option.elsewhere)}", width, 4)
    return "\n".join(lines)


def _group_text(group: Group, width: int) -> str:
    head = f"== {group.key}: {group.meaning}" if group.key else f"== {group.meaning}"
    return "\n".join([head, *(as_text(option, width) for option in group.options)])


def _wrapped(text: str, width: int, indent: int) -> list[str]:
    blank = " " * indent
    return textwrap.wrap(
        text,
        width,
        initial_indent=blank,
        subsequent_indent=blank,
        break_long_words=False,
        break_on_hyphens=False,
    )


def as_markdown(page: Sequence[Group]) -> str:
    """docs/options.md, without its last end of line."""
    sections = [group for group in page if group.key]
    contents = " · ".join(f"[{_title(group)}](#{_anchor(group)})" for group in sections)
    parts = [_HEAD, contents]
    for group in page:
        if group.key:
            parts += [f"{'#' * (2 + group.key.count('.'))} {_title(group)}", group.meaning]
        parts.append("\n".join(line for option in group.options for line in _bullet(option)))
    rows = [
        f"| {', '.join(f'`{word}`' for word in option.elsewhere)} | `{option.key}` |"
        for group in page
        for option in group.options
        if option.elsewhere
    ]
    parts += [
        "## What others call them",
        "\n".join(["| elsewhere | here |", "| --- | --- |", *rows]),
    ]
    return "\n\n".join(parts)


def _bullet(option: Option) -> Iterator[str]:
    default = "required" if option.default is None else f"default `{option.default}`"
    yield f"- **`{option.key}`** · {option.type} · {default}\\"
    yield f"  {option.meaning}"
    for name, text in option.kinds:
        yield f"  - `{name}`: {text}"
    if option.is_kind:
        yield f"  - `{OWN}` of your own ([docs/extending.md](extending.md))"


def _title(group: Group) -> str:
    return group.key.replace("[]", "")


def _anchor(group: Group) -> str:
    return _title(group).replace(".", "")
