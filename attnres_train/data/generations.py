"""The files of a corpus by when they came to a run: those that it began with, and those that
`data.new: append` added, each from a sample on."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from attnres_train.data.corpora.reader import CorpusReader, FileRow


class Generation(NamedTuple):
    """Files that belong to a corpus from its sample number ``start`` on."""

    start: int
    rows: Sequence[FileRow]


class Part(NamedTuple):
    """What reads the files of one generation."""

    start: int
    reader: CorpusReader


@dataclass(frozen=True)
class RunData:
    """What a run has already, and what it goes on with."""

    corpora: Sequence[Sequence[Part]]
    """Of each corpus, the generations of its files, the first from sample 0 on."""
    tokenizer: Path | None = None
    """The file of a tokenizer that it has trained."""


@dataclass
class Match:
    """The files of a corpus, held against the generations that a run knows."""

    known: list[list[Path]]
    """Of each generation, its files as they lie now, in the order of then."""
    new: list[Path] = field(default_factory=list)
    new_names: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    """Names of files that are not there any more."""
    changed: list[str] = field(default_factory=list)
    """Names of files that hold something else now."""

    @property
    def same(self) -> bool:
        return not (self.new or self.gone or self.changed)

    @property
    def grown(self) -> bool:
        """Whether it is as it was, but for files that are new."""
        return bool(self.new) and not (self.gone or self.changed)

    def __str__(self) -> str:
        told = (("new", self.new_names), ("changed", self.changed), ("gone", self.gone))
        return ", ".join(_some(what, names) for what, names in told if names)


def _some(what: str, names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names):,} {what}: {shown}"


def match(reader: CorpusReader, generations: Iterable[Generation]) -> Match:
    """Find the files of ``generations`` among those of ``reader``, by name, size and content."""
    here: dict[FileRow, deque[Path]] = defaultdict(deque)
    for file, row in zip(reader.files, reader.rows, strict=True):
        here[row].append(file)
    found = Match([])
    for generation in generations:
        files = []
        for row in map(FileRow._make, generation.rows):
            if here[row]:
                files.append(here[row].popleft())
            else:
                found.gone.append(row.name)
        found.known.append(files)
    names = {row.name for row, files in here.items() if files}
    found.changed = [name for name in found.gone if name in names]
    found.gone = [name for name in found.gone if name not in names]
    changed, left = set(found.changed), Counter(file for files in here.values() for file in files)
    for file, row in zip(reader.files, reader.rows, strict=True):
        if left[file] and row.name not in changed:
            left[file] -= 1
            found.new.append(file)
            found.new_names.append(row.name)
    return found


def parts(reader: CorpusReader, generations: Sequence[tuple[int, Sequence[Path]]]) -> list[Part]:
    """Readers of ``generations``, each (its first sample, its files)."""
    (_, first), *later = generations
    readers = [_narrowed(reader, first, ""), *(_narrowed(reader, f, "new files") for _, f in later)]
    return [Part(start, one) for (start, _), one in zip(generations, readers, strict=True)]


def _narrowed(reader: CorpusReader, files: Sequence[Path], told: str) -> CorpusReader:
    """``reader``, as if there were no files but ``files``: named as among all."""
    rows = dict(zip(reader.files, reader.rows, strict=True))
    one = copy.copy(reader)
    one.files, one.rows = tuple(files), [rows[file] for file in files]
    one.contents = {file: reader.contents[file] for file in files}
    one.which = told
    return one
