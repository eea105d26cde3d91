"""Megatron's token files as a corpus. Their layout, and how they are read: `data.indexed`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from attnres_train.config.files import beside
from attnres_train.data.corpora.reader import CorpusReader

ENDS = (".bin", ".idx")


class Indexed(CorpusReader):
    """Token ids in Megatron's .bin/.idx pairs, each named by its prefix."""

    holds_tokens = True

    def files_of(self, path: str) -> list[Path]:
        return [Path(path + end) for end in ENDS]

    def check_path(self, path: str) -> Iterator[str]:
        missing = [path + end for end in ENDS if not Path(path + end).is_file()]
        if missing and path.endswith(ENDS):
            yield f"{self.key}.path is {path}: name the pair by its prefix, {path[:-4]}"
        elif missing:
            told = " and no ".join(missing)
            yield f"{self.key}.path: there is no {told}{beside(Path(missing[0]))}"
