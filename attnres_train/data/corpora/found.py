"""The files that a path of a corpus stands for, in an order that depends on names alone, and what
is passed over on the way."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

PASSED_OVER = {"site-packages", "dist-packages", "__pycache__"}


def files_in(folder: Path, suffixes: Sequence[str] = ()) -> Iterator[Path]:
    """The files below ``folder`` whose names end in one of ``suffixes`` (all without), in capitals
    or not: of each folder its own files first, then those of the folders in it.

    As with a glob, what is hidden (``.ipynb_checkpoints``) is left out, and links to folders are
    followed, but never in a circle.
    """
    for parent, names in _walk(str(folder), ()):
        for name in names:
            if ends_in(name, suffixes):
                yield Path(parent, name)


def files_left_out(folder: Path, suffixes: Sequence[str]) -> list[str]:
    """The other files below ``folder`` that are not hidden, relative to it."""
    return [
        os.path.relpath(os.path.join(parent, name), folder)
        for parent, names in _walk(str(folder), ())
        for name in names
        if not ends_in(name, suffixes)
    ]


def ends_in(name: str, suffixes: Sequence[str]) -> bool:
    return not suffixes or name.lower().endswith(tuple(suffixes))


def _walk(folder: str, above: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of its files) of all folders from ``folder`` down."""
    here = os.path.realpath(folder)
    if here in above:
        return
    with os.scandir(folder) as entries:
        shown = [entry for entry in entries if not entry.name.startswith(".")]
    folders = sorted(entry.name for entry in shown if entry.is_dir())
    yield folder, sorted(entry.name for entry in shown if not entry.is_dir())
    for name in folders:
        if name not in PASSED_OVER:
            yield from _walk(os.path.join(folder, name), (*above, here))


def matches(pattern: str) -> tuple[list[Path], list[Path]]:
    """The files and the folders that a glob pattern matches, each sorted."""
    found = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]
    return [path for path in found if path.is_file()], [path for path in found if path.is_dir()]
