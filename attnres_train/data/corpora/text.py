"""Plain text: a file is a document."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from attnres_train.data.corpora.reader import CorpusReader, Passage
from attnres_train.errors import UserError

# Plain text is cut into passages of about this many characters, at line ends: no file is ever held
# in memory, and even a corpus of one file can be shuffled and split.
PASSAGE_CHARS = 1 << 16


class Text(CorpusReader):
    """Plain text in UTF-8, a document per file."""

    suffixes: ClassVar[tuple[str, ...]] = (".txt", ".md")
    decoding_errors: ClassVar[str] = "strict"

    def passages(self, file: Path) -> Iterator[Passage]:
        with open(file, encoding="utf-8", errors=self.decoding_errors, newline="") as stream:
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


class PythonStdlib(Text):
    """The sources of this Python's standard library: some 30 MB of code and prose that are there
    wherever we run."""

    reads = frozenset()
    suffixes = (".py", ".txt", ".rst")
    # Its tests hold a few files that are no UTF-8 on purpose.
    decoding_errors = "replace"

    def find_files(self) -> Iterator[Path]:
        return self.files_in(Path(sysconfig.get_path("stdlib")))
