"""Tokenizers in tiktoken's rank files: a token and its rank a line."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from attnres_train.config.schema import TokenizerConfig
from attnres_train.data.tokenizers.hugging_face import END_OF_DOCUMENT
from attnres_train.data.tokenizers.kind import FileTokenizer
from attnres_train.errors import UserError

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class RankFile(FileTokenizer):
    """A tiktoken rank file. Needs tiktoken."""

    def load(self, content: bytes, path: Path) -> Tiktoken:
        return Tiktoken(content, path, self.section)

    def fingerprint(self) -> list[Any]:
        # The expression is in no file.
        expression = self.section.pattern or GPT2_PATTERN
        return [] if expression == GPT2_PATTERN else [expression]


class Tiktoken:
    """The backend of a rank file. Encodes on all cores."""

    def __init__(self, content: bytes, path: Path, config: TokenizerConfig) -> None:
        try:
            import tiktoken
        except ImportError as error:
            raise UserError(
                "data.tokenizer.kind is tiktoken, which needs the package of that name: "
                "pip install 'attnres-train[data]'"
            ) from error
        ranks = _ranks(content, path)
        named = config.eod if isinstance(config.eod, str) else END_OF_DOCUMENT
        self.eod = config.eod if isinstance(config.eod, int) else max(ranks.values()) + 1
        self.backend: Any = tiktoken.Encoding(
            path.stem,
            pat_str=config.pattern or GPT2_PATTERN,
            mergeable_ranks=ranks,
            special_tokens={} if self.eod in ranks.values() else {named: self.eod},
        )
        self.vocab_size: int = self.backend.n_vocab

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self.backend.encode_ordinary_batch(texts)

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode(ids)


def _ranks(content: bytes, path: Path) -> dict[bytes, int]:
    """Token -> rank. A line holds one of each: the token in base64, the rank in decimal.

    Not by tiktoken's own loader, which would keep an old copy of a file that has changed.
    """
    ranks = {}
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise UserError(
                f"data.tokenizer.path: {path}, line {number} is no tiktoken rank: {error}"
            ) from error
    if not ranks:
        raise UserError(f"data.tokenizer.path: {path} is empty")
    return ranks
