"""Datasets that Hugging Face's `datasets` has saved: folders of Arrow files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attnres_train.data.corpora.reader import Passage
from attnres_train.data.corpora.records import Parquet
from attnres_train.errors import UserError

_SPLITS = "dataset_dict.json"
# What `map` and `filter` have left beside a dataset: other rows.
_CACHED = "cache-"


class SavedDataset(Parquet):
    """A dataset that Hugging Face's `datasets` has saved (`save_to_disk`) or cached: a document per
    row. Needs pyarrow."""

    suffixes = (".arrow",)

    def files_in(self, folder: Path) -> Iterator[Path]:
        """Raises UserError for a folder of several splits: which is meant?"""
        if (folder / _SPLITS).is_file():
            found = json.loads((folder / _SPLITS).read_text(encoding="utf-8")).get("splits", [])
            raise UserError(
                f"{self.key}.path: {folder} holds the splits {', '.join(found)}: name the folder "
                "of one"
            )
        yield from (one for one in super().files_in(folder) if not one.name.startswith(_CACHED))

    def passages(self, file: Path) -> Iterator[Passage]:
        pyarrow, number = self.pyarrow(), 0
        rows = 0
        try:
            with pyarrow.memory_map(str(file)) as source:
                stream = self._stream(pyarrow, source, file)
                for batch in stream:
                    num_bytes = batch.nbytes // max(1, len(batch))
                    for number, value in enumerate(batch.column(self.field), rows + 1):
                        yield Passage(self._value(value, file, number), True, num_bytes)
                    rows += len(batch)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(
                f"{file} is damaged after row {number}: {error}: copy or make it again"
            ) from error

    def _stream(self, pyarrow: Any, source: Any, file: Path) -> Any:
        """The batches of ``file``, which has the field."""
        try:
            stream = pyarrow.ipc.open_stream(source)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{file} is no Arrow file of a dataset: {error}") from error
        self.check_column(stream.schema.names, file)
        return stream
