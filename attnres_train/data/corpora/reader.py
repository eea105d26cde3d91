"""What every kind of corpus answers: the files that the configuration names, the text in them a
passage at a time, and what a cache of it depends on."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from attnres_train.config.data_schema import CorpusConfig, DataConfig
from attnres_train.config.files import beside, unread
from attnres_train.config.kinds import Kind, resolve
from attnres_train.config.schema import RunConfig
from attnres_train.data.corpora.content import (
    FileContent,
    digest_of,
    names_below,
    read_contents,
)
from attnres_train.data.corpora.found import files_in, files_left_out, matches
from attnres_train.data.own_code import errors_of
from attnres_train.errors import UserError


class Passage(NamedTuple):
    """A document, or a part of a long one."""

    text: str
    ends_document: bool = True
    num_bytes: int = 0
    """Bytes of the input file that it took: they move the progress bar, nothing else."""


class FileRow(NamedTuple):
    """What a file is known by: its name below the corpus's path, bytes, hash of some blocks."""

    name: str
    size: int
    sampled: str


class CorpusReader(Kind):
    """A corpus and how it is read: base of all kinds of corpus.

    A kind of your own has `suffixes` and `passages`, where its files are text. One object serves a
    whole `prepare`, so that every step sees the same files. It works in the one process that
    prepares data: the ranks of a run read token shards alone.
    """

    section: CorpusConfig
    reads: ClassVar[frozenset[str]] = frozenset({"path"})
    """What it reads of the section's keys ``path`` and ``text_field``."""
    suffixes: ClassVar[tuple[str, ...]] = ()
    """The files that a folder in ``path`` stands for, by the ends of their names in small letters;
    (): all."""
    holds_tokens: ClassVar[bool] = False
    """Whether its files are Megatron's .bin/.idx pairs (`prefixes`), which need no tokenizer,
    instead of text (`passages`)."""
    version: ClassVar[int | str | None] = None
    """Change it when the same files give other passages than before: caches are then made anew."""
    verify: Literal["sampled", "full"] = "sampled"
    """`data.verify`: how closely its files are looked at."""
    which: str = ""
    """Of a reader of some of its files alone, which those are: for messages."""

    def passages(self, file: Path) -> Iterator[Passage]:
        """The text of one input file, in order; the last passage ends a document.

        Raises UserError naming the file, and the line or row where there is one. Whatever else it
        raises, `read` makes one of.
        """
        raise UserError(f"{self.key}.kind {self.kind} has no method passages(file)")

    def read(self, file: Path) -> Iterator[Passage]:
        """The `passages` of ``file``, for whoever wants them.

        Raises UserError that names kind and file for whatever goes wrong in the kind's own code.
        """
        inside = False
        with errors_of(self, f"reading {file}"):
            for passage in self.passages(file):
                if not (isinstance(passage, Passage) and isinstance(passage.text, str)):
                    raise self._wrong(file, f"must yield Passage(text, ...), not {passage!r:.80}")
                inside = not passage.ends_document
                yield passage
            if inside:
                raise self._wrong(file, "must end the document with the last passage of a file")

    def text_bytes(self, file: Path) -> int:
        """About how many bytes of text ``file`` holds."""
        return self.contents[file].size

    def some_text(self, file: Path, places: Sequence[float], size: int) -> Iterator[str]:
        """About ``size`` bytes of text of ``file`` at each of ``places`` (0 is its beginning, 1 its
        end; ascending), to train a tokenizer on.

        A kind that cannot begin to read anywhere, as is supposed here, reads from the beginning, up
        to 8 times as much as is asked for, and gives passages at even distances.
        """
        wanted = len(places) * size
        step = min(8.0, max(1.0, self.text_bytes(file) / wanted))
        read, given = 0, 0
        for passage in self.read(file):
            if given * step <= read:
                yield passage.text[:size]
                given += min(len(passage.text), size)
            read += len(passage.text)
            if read >= step * wanted:
                break

    def reads_as(self, kind: type[CorpusReader]) -> bool:
        """Whether its passages are those of ``kind``, which knows where they lie in a file."""
        return type(self).passages is kind.passages

    def _wrong(self, file: Path, what: str) -> UserError:
        return UserError(f"{self.key}.kind {self.kind}, reading {file}: passages() {what}")

    @cached_property
    def notes(self) -> list[str]:
        """What was passed over when the `files` were looked for, to be told once: a line each."""
        return []

    @property
    def kind(self) -> str:
        """As the configuration names it."""
        return self.section.kind

    @property
    def name(self) -> str:
        """For messages: kind and path."""
        path, which = self.section.path, f", {self.which}" if self.which else ""
        return (self.kind if path is None else f"{self.kind} {path}") + which

    @property
    def paths(self) -> list[str]:
        path = self.section.path
        return [path] if isinstance(path, str) else path or []

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """The input files, found once, in an order that depends on names alone.

        Raises UserError where there are none.
        """
        found = tuple(map(Path, self.find_files()))
        if twice := len(found) - len(set(found)):
            self.notes.append(f"{self.key}.path: {twice:,} files are named twice, and read twice")
        return found

    def find_files(self) -> Iterator[Path]:
        """Look for the `files`, in the same order each time.

        A kind that reads no ``path`` has a way of its own. Raises UserError where there are none.
        """
        if not self.paths:
            raise UserError(self._no_path())
        for path in self.paths:
            found = self.files_of(path)
            missing = [str(file) for file in found if not file.is_file()]
            if missing:
                kind = "regular file" if os.path.exists(missing[0]) else "file"
                raise UserError(f"{self.key}.path: there is no {kind} {' and no '.join(missing)}")
            if not found:
                wanted = " or ".join(f"*{suffix}" for suffix in self.suffixes) or "file"
                what = f"no {wanted} in the folder" if Path(path).is_dir() else "no file"
                raise UserError(f"{self.key}.path: there is {what} {path}")
            yield from found

    def files_of(self, path: str) -> list[Path]:
        """What one ``path`` stands for: a file, a folder (by `suffixes`) or a glob."""
        if Path(path).is_dir():
            return list(self.files_in(Path(path)))
        if glob.has_magic(path) and not Path(path).exists():
            files, folders = matches(path)
            if files:
                self._note(path, [str(folder) for folder in folders if "**" not in path], "folder")
                return files
            return [file for folder in folders for file in self.files_in(folder)]
        return [Path(path)]

    def files_in(self, folder: Path) -> Iterator[Path]:
        """The files that ``folder`` stands for."""
        if self.suffixes:
            self._note(str(folder), files_left_out(folder, self.suffixes), "file")
        yield from files_in(folder, self.suffixes)

    def _note(self, path: str, left_out: list[str], what: str) -> None:
        """Keep in mind what is passed over in ``path``, for `notes`."""
        if left_out:
            shown = ", ".join(left_out[:3]) + (", ..." if len(left_out) > 3 else "")
            reads = " ".join(f"*{suffix}" for suffix in self.suffixes)
            read = f"kind {self.kind} reads {reads}" if what == "file" else "files alone are read"
            number = f"{len(left_out):,} {what}{'s' if len(left_out) > 1 else ''}"
            self.notes.append(f"{self.key}.path {path}: {number} passed over ({shown}): {read}")

    def prefixes(self) -> list[str]:
        """The .bin/.idx prefixes of a corpus that holds tokens."""
        return [str(file.with_suffix("")) for file in self.files if file.suffix == ".idx"]

    @cached_property
    def contents(self) -> dict[Path, FileContent]:
        """What each of the `files` holds, read once.

        Raises UserError naming a file that cannot be read.
        """
        try:
            found = read_contents(self.files, full=self.verify == "full")
        except FileNotFoundError:
            raise  # none of ours: `find_files` has looked
        except OSError as error:
            raise UserError(f"{self.key}.path: cannot read {error.filename}: {error}") from error
        return dict(zip(self.files, found, strict=True))

    @cached_property
    def rows(self) -> list[FileRow]:
        """What each of the `files` is known by, in their order. Not where they lie, nor when they
        were written."""
        names = names_below(self.files, self.paths)
        contents = [self.contents[file] for file in self.files]
        return [
            FileRow(name, one.size, one.sampled) for name, one in zip(names, contents, strict=True)
        ]

    def identity(self) -> list[Any]:
        """What its passages depend on, as JSON can hold it: its `rows`, and how they are read."""
        options = self.options.model_dump(mode="json")
        return [self.kind, self.section.text_field, digest_of(self.rows), options, self.version]

    def fingerprint(self) -> list[Any]:
        """What a cache of this corpus depends on: its `identity`, with `data.verify: full` also the
        hashes of whole files."""
        if self.verify == "sampled":
            return self.identity()
        return [*self.identity(), digest_of([[self.contents[file].full] for file in self.files])]

    def check_unchanged(self, files: Iterable[Path]) -> None:
        """Raises UserError where one of ``files`` was written to since it was fingerprinted: what
        was read of it is not what the fingerprint stands for."""
        for file in files:
            stat, known = file.stat(), self.contents[file]
            if (stat.st_size, stat.st_mtime_ns) != (known.size, known.mtime_ns):
                raise UserError(
                    f"{self.key}.path: {file} was changed while it was read: start again when "
                    "nothing writes to it"
                )

    def check(self, config: RunConfig) -> Iterator[str]:
        """A path that is missing, not there, or not read."""
        if "path" not in self.reads:
            if self.section.path is not None:
                yield unread(f"{self.key}.path", self.kind)
        elif not self.paths:
            yield self._no_path()
        elif not config.stages:  # the data of a stage that is over may be gone: `files` looks
            for path in self.paths:
                yield from self.check_path(path)

    def check_path(self, path: str) -> Iterator[str]:
        """Whether files may be there, quickly: `files` looks more closely."""
        if Path(path).is_dir():
            if not any(file.is_file() for file in Path(path).rglob("*")):
                yield f"{self.key}.path: the folder {path} holds no file"
        elif not (Path(path).exists() or glob.glob(path, recursive=True)):
            yield f"{self.key}.path: there is no file {path}{beside(Path(path))}"

    def _no_path(self) -> str:
        return f"{self.key}.path is missing: a corpus of kind {self.kind} needs one"


def corpus_readers(config: DataConfig) -> list[CorpusReader]:
    """The reader of each corpus in ``data.corpus``, before it has looked for files."""
    readers = []
    for number, corpus in enumerate(config.corpus):
        reader = resolve("data.corpus.kind", corpus.kind)(corpus, f"data.corpus.{number}")
        reader.verify = config.verify
        readers.append(reader)
    return readers


def find_corpora(config: DataConfig) -> list[CorpusReader]:
    """The reader of each corpus in ``data.corpus``, its files found and fingerprinted.

    Raises UserError when nothing is there, or a file cannot be read.
    """
    readers = corpus_readers(config)
    for reader in readers:
        with errors_of(reader, "looking for its files"):
            reader.fingerprint()
    return readers
