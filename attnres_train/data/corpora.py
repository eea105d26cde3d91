"""Corpora: which input files a configuration names, and the text in them, a passage at a time."""

from __future__ import annotations

import glob
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from attnres_train.config.schema import CorpusConfig, DataConfig
from attnres_train.errors import UserError

# Plain text is cut into passages of about this many characters, at line ends: no file is ever held
# in memory, and even a corpus of one file can be shuffled and split.
PASSAGE_CHARS = 1 << 16
# What a folder in `data.corpus.*.path` stands for.
SUFFIXES = {
    "text": (".txt", ".md"),
    "jsonl": (".jsonl",),
    "parquet": (".parquet",),
    "python-stdlib": (".py", ".txt", ".rst"),
}
PASSED_OVER = {"site-packages", "dist-packages", "__pycache__"}


class Passage(NamedTuple):
    """A document, or a part of a long one."""

    text: str
    ends_document: bool
    num_bytes: int
    """Bytes of the input file that it took."""


@dataclass(frozen=True)
class Corpus:
    """A corpus whose input files were found. ``key`` is the user's: ``data.corpus.0``."""

    key: str
    config: CorpusConfig
    files: tuple[Path, ...]

    @property
    def name(self) -> str:
        path = self.config.path
        return self.config.kind if path is None else f"{self.config.kind} {path}"

    @property
    def prefixes(self) -> list[str]:
        """The .bin/.idx prefixes of an ``indexed`` corpus."""
        return [str(file.with_suffix("")) for file in self.files if file.suffix == ".idx"]

    def fingerprint(self) -> list:
        """What a cache of this corpus depends on: names, sizes and times, not contents."""
        stats = [(str(file), file.stat()) for file in self.files]
        files = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
        return [self.config.kind, self.config.text_field, files]

    def passages(self, file: Path) -> Iterator[Passage]:
        """The text of one input file, in order.

        Raises UserError naming the file, and the line or row where there is one.
        """
        if self.config.kind == "jsonl":
            return _jsonl(file, self.config.text_field, self.key)
        if self.config.kind == "parquet":
            return _parquet(file, self.config.text_field, self.key)
        # The standard library's own tests hold a few files that are no UTF-8 on purpose.
        errors = "replace" if self.config.kind == "python-stdlib" else "strict"
        return _text(file, errors)


def find_corpora(config: DataConfig) -> list[Corpus]:
    """The corpora of ``data.corpus`` with their files, in an order that depends on names alone.

    Raises UserError when nothing is there.
    """
    corpora = []
    for number, corpus in enumerate(config.corpus):
        key = f"data.corpus.{number}"
        files = tuple(_files(corpus, key))
        corpora.append(Corpus(key, corpus, files))
    return corpora


def _files(corpus: CorpusConfig, key: str) -> Iterator[Path]:
    if corpus.kind == "python-stdlib":
        yield from _folder(Path(sysconfig.get_path("stdlib")), corpus.kind)
        return
    paths = [corpus.path] if isinstance(corpus.path, str) else corpus.path
    if not paths:
        raise UserError(f"{key}.path is missing: a corpus of kind {corpus.kind} needs one")
    for path in paths:
        if corpus.kind == "indexed":
            found = [Path(path + suffix) for suffix in (".bin", ".idx")]
        elif Path(path).is_dir():
            found = list(_folder(Path(path), corpus.kind))
        elif glob.has_magic(path) and not Path(path).exists():
            matches = map(Path, sorted(glob.glob(path, recursive=True)))
            found = [match for match in matches if match.is_file()]
        else:
            found = [Path(path)]
        missing = [str(file) for file in found if not file.is_file()]
        if missing:
            raise UserError(f"{key}.path: there is no file {' and no '.join(missing)}")
        if not found:
            wanted = " or ".join(f"*{suffix}" for suffix in SUFFIXES[corpus.kind])
            what = f"no {wanted} in the folder" if Path(path).is_dir() else "no file"
            raise UserError(f"{key}.path: there is {what} {path}")
        yield from found


def _folder(folder: Path, kind: str) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(set(folders) - PASSED_OVER)
        yield from (Path(parent, name) for name in sorted(names) if name.endswith(SUFFIXES[kind]))


def _text(file: Path, errors: str) -> Iterator[Passage]:
    """A text file is one document."""
    with open(file, encoding="utf-8", errors=errors, newline="") as stream:
        # At most one line more than PASSAGE_CHARS, and twice that where a line is no line.
        pieces = iter(lambda: stream.read(PASSAGE_CHARS) + stream.readline(PASSAGE_CHARS), "")
        try:
            text = next(pieces, "")
            for following in pieces:
                yield Passage(text, False, len(text.encode()))
                text = following
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not UTF-8 text: {error.reason}") from error
        yield Passage(text, True, len(text.encode()))


def _jsonl(file: Path, field: str, key: str) -> Iterator[Passage]:
    """A line is a document."""
    with open(file, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{file}, line {number}: not valid JSON: {error}") from error
            if not isinstance(row, dict):
                raise UserError(f"{file}, line {number}: not a JSON object")
            if field not in row:
                raise UserError(
                    f'{file}, line {number}: there is no field "{field}" but '
                    f"{', '.join(row) or 'none'}: set {key}.text_field"
                )
            text = _string(row[field], f"{file}, line {number}", field)
            # JSON can spell half a surrogate pair, which is no text: "?" takes its place.
            yield Passage(text.encode(errors="replace").decode(), True, len(line))


def _parquet(file: Path, field: str, key: str) -> Iterator[Passage]:
    """A row is a document."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"{key}.kind is parquet, which needs pyarrow: pip install 'attnres-train[data]'"
        ) from error
    try:
        table = pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{file} is not a Parquet file: {error}") from error
    with table:
        columns, rows = table.schema_arrow.names, table.metadata.num_rows
        if field not in columns:
            raise UserError(
                f'{file}: there is no column "{field}" but {", ".join(columns)}: '
                f"set {key}.text_field"
            )
        number, num_bytes = 0, file.stat().st_size // max(1, rows)
        for batch in table.iter_batches(batch_size=256, columns=[field]):
            for value in batch.column(0):
                number += 1
                text = _string(value.as_py(), f"{file}, row {number}", field)
                yield Passage(text, True, num_bytes)


def _string(value: Any, place: str, field: str) -> str:
    """A document's text; null is an empty document."""
    if value is None:
        return ""
    if not isinstance(value, str):
        kind = type(value).__name__
        raise UserError(f'{place}: the field "{field}" is {kind}, not text')
    return value
