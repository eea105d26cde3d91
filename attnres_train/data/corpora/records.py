"""Files of records, one field of which is the text: a record is a document."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from attnres_train.data.corpora.compressed import DAMAGED, FORMS, open_maybe_compressed
from attnres_train.data.corpora.encoding import check_encoding
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
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise UserError(
                f"{self.key}.kind is {self.kind}, which needs pyarrow: "
                "pip install 'attnres-train[data]'"
            ) from error
        damaged = (pyarrow.ArrowException, OSError)
        try:
            # Checksums of pages are optional in Parquet: those that are there are looked at.
            table = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)
        except damaged as error:
            raise UserError(f"{file} is not a Parquet file: {error}") from error
        with table:
            columns, rows = table.schema_arrow.names, table.metadata.num_rows
            if self.field not in columns:
                raise UserError(
                    f'{file}: there is no column "{self.field}" but {", ".join(columns)}: '
                    f"set {self.key}.text_field"
                )
            number, num_bytes = 0, file.stat().st_size // max(1, rows)
            try:
                for batch in table.iter_batches(batch_size=256, columns=[self.field]):
                    for value in batch.column(0):
                        number += 1
                        yield Passage(self._value(value, file, number), True, num_bytes)
            except damaged as error:
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
