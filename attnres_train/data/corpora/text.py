"""Plain text: a file is a document."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from attnres_train.data.corpora.cutting import place_to_cut
from attnres_train.data.corpora.encoding import check_encoding, no_utf8
from attnres_train.data.corpora.found import PASSED_OVER
from attnres_train.data.corpora.reader import CorpusReader, Passage

# A file is read in passages of about this many characters: none is ever held in memory.
PASSAGE_CHARS = 1 << 16


class Text(CorpusReader):
    """Plain text in UTF-8, a document per file."""

    suffixes: ClassVar[tuple[str, ...]] = (".txt", ".md")
    # A mark at the very beginning (BOM) is no text.
    encoding: ClassVar[str] = "utf-8-sig"
    decoding_errors: ClassVar[str] = "strict"

    def passages(self, file: Path) -> Iterator[Passage]:
        """Raises UserError with line and byte where ``file`` is no UTF-8 text."""
        if self.decoding_errors == "strict":
            with open(file, "rb") as head:
                check_encoding(head.read(1 << 12), file)
        with open(file, encoding=self.encoding, errors=self.decoding_errors, newline="") as stream:
            text, more = "", "-"
            try:
                while more:
                    # Of a cut near the beginning, more may be left than is read at once.
                    if len(text) < PASSAGE_CHARS:
                        more = stream.read(PASSAGE_CHARS)
                        text += more
                    if more and len(text) >= PASSAGE_CHARS:
                        place = place_to_cut(text)
                        yield Passage(text[:place], False, len(text[:place].encode()))
                        text = text[place:]
            except UnicodeDecodeError as error:
                raise no_utf8(file) from error
            yield Passage(text, True, len(text.encode()))

    def some_text(self, file: Path, places: Sequence[float], size: int) -> Iterator[str]:
        if not self.reads_as(Text):
            yield from super().some_text(file, places, size)
            return
        with open(file, "rb") as stream:
            length = os.fstat(stream.fileno()).st_size
            for place in places:
                stream.seek(min(int(place * length), max(0, length - size)))
                # Of a character that is cut, the rest is ignored.
                yield stream.read(size).decode(self.encoding, errors="ignore")


class PythonStdlib(Text):
    """The sources of this Python's standard library: some 30 MB of code and prose that are there
    wherever we run."""

    reads = frozenset()
    suffixes = (".py", ".txt", ".rst")
    # Its tests hold a few files that are no UTF-8 on purpose, or begin with a mark.
    encoding = "utf-8"
    decoding_errors = "replace"

    def find_files(self) -> Iterator[Path]:
        # Not as a user's folder is looked through: what other versions found stays what is found.
        for parent, folders, names in os.walk(sysconfig.get_path("stdlib")):
            folders[:] = sorted(set(folders) - PASSED_OVER)  # os.walk goes on with what is left
            yield from (Path(parent, name) for name in sorted(names) if self._is_source(name))

    def _is_source(self, name: str) -> bool:
        return name.endswith(self.suffixes)
