"""Files of records, one field of which is the text: a record is a document."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    """JSONL: a JSON object per line, a document each."""

    suffixes = (".jsonl",)

    def passages(self, file: Path) -> Iterator[Passage]:
        with open(file, "rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    text = self._text(line, f"{file}, line {number}")
                    yield Passage(text, True, len(line))

    def _text(self, line: bytes, place: str) -> str:
        try:
            row = json.loads(line)
        except ValueError as error:
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
        try:
            table = pyarrow.parquet.ParquetFile(file)
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{file} is not a Parquet file: {error}") from error
        with table:
            columns, rows = table.schema_arrow.names, table.metadata.num_rows
            if self.field not in columns:
                raise UserError(
                    f'{file}: there is no column "{self.field}" but {", ".join(columns)}: '
                    f"set {self.key}.text_field"
                )
            number, num_bytes = 0, file.stat().st_size // max(1, rows)
            for batch in table.iter_batches(batch_size=256, columns=[self.field]):
                for value in batch.column(0):
                    number += 1
                    text = self.text_of(value.as_py(), f"{file}, row {number}")
                    yield Passage(text, True, num_bytes)
