"""Files of records, one field of which is the text: a record is a document."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from attnres_train.data.corpora.compressed import DAMAGED, FORMS, open_maybe_compressed
from attnres_train.data.corpora.encoding import check_encoding
from attnres_train.data.corpora.found import ends_in
from attnres_train.data.corpora.reader import CorpusReader, Passage
from attnres_train.errors import UserError


class Records(CorpusReader):
    """Records whose field ``text_field`` is the text."""

    reads = frozenset({"path", "text_field"})

    @property
    def field(self) -> str:
        return self.section.text_field

    def text_of(self, value: Any, place: str) -> str:
        """A document's text; null is an empty document."""
        if value is None:
            return ""
        if not isinstance(value, str):
            kind = type(value).__name__
            raise UserError(f'{place}: the field "{self.field}" is {kind}, not text')
        return value


class JsonLines(Records):
    """JSONL: a JSON object per line, a document each; also compressed (gzip, bzip2, xz, zstd)."""

    suffixes = (".jsonl", *(f".jsonl{end}" for end in FORMS))

    def passages(self, file: Path) -> Iterator[Passage]:
        number = 0
        with open(file, "rb") as raw, open_maybe_compressed(raw, file) as stream:
            try:
                for number, line in enumerate(self._lines(stream, file), start=1):
                    if line.strip():
                        text = self._text(line, f"{file}, line {number}")
                        # In the file: that is what moves the progress bar.
                        num_bytes = len(line) if stream is raw else 0
                        yield Passage(text, True, num_bytes)
            except DAMAGED as error:
                raise UserError(
                    f"{file} is damaged or truncated after line {number}: {error}: copy or make "
                    "it again"
                ) from error

    def text_bytes(self, file: Path) -> int:
        # What the usual forms make of text.
        return super().text_bytes(file) * (4 if ends_in(file.name, tuple(FORMS)) else 1)

    def some_text(self, file: Path, places: Sequence[float], size: int) -> Iterator[str]:
        with open(file, "rb") as raw, open_maybe_compressed(raw, file) as stream:
            seeks = stream is raw and self.reads_as(JsonLines)
            for place in places if seeks else ():
                yield from self._lines_from(raw, file, place, size)
        if not seeks:
            yield from super().some_text(file, places, size)

    def _lines_from(self, raw: IO[bytes], file: Path, place: float, size: int) -> Iterator[str]:
        """The documents after a ``place``, the last of them to ``size`` bytes together."""
        length = os.fstat(raw.fileno()).st_size
        raw.seek(min(int(place * length), max(0, length - size)))
        if raw.tell():
            raw.readline()  # the rest of one
        left = size
        while left > 0 and (line := raw.readline()):
            if line.strip():
                text = self._text(line, f"{file}, before byte {raw.tell()}")
                yield text[:left]
                left -= len(text)

    def _lines(self, stream: IO[bytes], file: Path) -> Iterator[bytes]:
        for number, line in enumerate(stream):
            if number == 0:
                check_encoding(line, file)
            yield line

    def _text(self, line: bytes, place: str) -> str:
        try:
            row = json.loads(line.removeprefix(codecs.BOM_UTF8).decode(errors="surrogatepass"))
        except UnicodeDecodeError as error:
            byte = f"byte {error.start} of the line (0x{line[error.start]:02x})"
            raise UserError(
                f"{place}: not valid JSON: not UTF-8 text: {error.reason} at {byte}"
            ) from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: not valid JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{place}: not a JSON object")
        if self.field not in row:
            raise UserError(
                f'{place}: there is no field "{self.field}" but {", ".join(row) or "none"}: '
                f"set {self.key}.text_field"
            )
        # JSON can spell half a surrogate pair, which is no text: "?" takes its place.
        return self.text_of(row[self.field], place).encode(errors="replace").decode()


class Parquet(Records):
    """Parquet: a document per row. Needs pyarrow."""

    suffixes = (".parquet",)

    def passages(self, file: Path) -> Iterator[Passage]:
        with self._table(file) as table:
            num_bytes = file.stat().st_size // max(1, table.metadata.num_rows)
            for number, value in self._rows(table, file):
                yield Passage(self._value(value, file, number), True, num_bytes)

    def some_text(self, file: Path, places: Sequence[float], size: int) -> Iterator[str]:
        if not self.reads_as(Parquet):
            yield from super().some_text(file, places, size)
            return
        with self._table(file) as table:
            first = 0
            for group in range(table.num_row_groups):
                # A group is read from its beginning, and once for all places in it.
                after = first + table.metadata.row_group(group).num_rows
                wanted = [int(place * table.metadata.num_rows) for place in places]
                wanted = [row for row in wanted if first <= row < after]
                if wanted:
                    rows = self._rows(table, file, [group], first)
                    yield from self._texts(rows, file, wanted, size)
                first = after

    def _texts(
        self, rows: Iterator[tuple[int, Any]], file: Path, wanted: list[int], size: int
    ) -> Iterator[str]:
        """About ``size`` bytes of text of ``rows`` from each ``wanted`` one on."""
        left = passed = 0
        for number, value in rows:
            while passed < len(wanted) and wanted[passed] < number:
                left, passed = left + size, passed + 1
            if left > 0:
                text = self._value(value, file, number)[:left]
                yield text
                left -= len(text)
            elif passed == len(wanted):
                break

    @contextmanager
    def _table(self, file: Path) -> Iterator[Any]:
        """The open ``file``, which has the field."""
        pyarrow = self.pyarrow()
        try:
            # Checksums of pages are optional in Parquet: those that are there are looked at.
            table = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{file} is not a Parquet file: {error}") from error
        with table:
            self.check_column(table.schema_arrow.names, file)
            yield table

    def pyarrow(self) -> Any:
        """The package. Raises UserError where it is not installed."""
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise UserError(
                f"{self.key}.kind is {self.kind}, which needs pyarrow: "
                "pip install 'attnres-train[data]'"
            ) from error
        return pyarrow

    def check_column(self, columns: Sequence[str], file: Path) -> None:
        """Raise UserError where ``file`` has no column for the field."""
        if self.field not in columns:
            raise UserError(
                f'{file}: there is no column "{self.field}" but {", ".join(columns)}: '
                f"set {self.key}.text_field"
            )

    def _rows(
        self, table: Any, file: Path, groups: list[int] | None = None, first: int = 0
    ) -> Iterator[tuple[int, Any]]:
        """The values of the field and the numbers of their rows, counted from 1: of all, or of some
        ``groups`` of rows after the ``first`` ones."""
        import pyarrow

        number = first
        try:
            for batch in table.iter_batches(256, row_groups=groups, columns=[self.field]):
                for value in batch.column(0):
                    number += 1
                    yield number, value
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(
                f"{file} is damaged after row {number}: {error}: copy or make it again"
            ) from error

    def _value(self, value: Any, file: Path, number: int) -> str:
        place = f"{file}, row {number}"
        try:
            return self.text_of(value.as_py(), place)
        except UnicodeDecodeError as error:
            raise UserError(
                f'{place}: the field "{self.field}" is not UTF-8 text: {error.reason} at byte '
                f"{error.start} (0x{error.object[error.start]:02x})"
            ) from error
