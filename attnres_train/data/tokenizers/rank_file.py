"""Tokenizers in tiktoken's rank files: a token and its rank a line. Such a file holds neither how
text is split nor special tokens: `patterns`."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attnres_train.config.data_schema import TokenizerConfig
from attnres_train.config.schema import RunConfig
from attnres_train.data.tokenizers.kind import FileTokenizer
from attnres_train.data.tokenizers.library import missing_ids, told
from attnres_train.data.tokenizers.patterns import (
    END_OF_DOCUMENT,
    FAMILIES,
    family,
    pattern_problems,
)
from attnres_train.errors import UserError
from attnres_train.words import some_of

# Ids are 32 bits there, and 31 in token shards.
MAX_ID = 2**31 - 1
# What expressions take differently: contractions, numbers, blanks and ends of lines, scripts.
_PROBES = (
    "They'll say it's 1,234,567.89 times WE'D paid\tin 2026 - isn't it?",
    "def f(x):\n    return {'a': x**2}  # of x\r\n\r\n\n   end  \n",
    "Straße, naïve Ωμέγα, Привет мир, 漢字とかな, 中文字符123, עברית, हिन्दी, a\u0301 \U0001f680!",
)


class RankFile(FileTokenizer):
    """A tiktoken rank file. Needs tiktoken."""

    unread_keys = ()

    def load(self, content: bytes, path: Path) -> Tiktoken:
        return Tiktoken(content, path, self.section)

    def check(self, config: RunConfig) -> Iterator[str]:
        yield from super().check(config)
        yield from pattern_problems(f"{self.key}.pattern", self.section.pattern)
        if self.section.special_tokens is not None:
            yield from _special_token_problems(self.section.special_tokens)

    def fingerprint(self) -> list[Any]:
        # GPT-2's is left out, so that what was cached before it had a name is found.
        expression = family(self.section.pattern).expression
        return [] if expression == FAMILIES["gpt2"].expression else [expression]


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
        ranks = read_ranks(content, path)
        special_tokens = _special_tokens(ranks, path, config)
        self.eod = _end_of_document(special_tokens, path, config)
        _check_ids(ranks, special_tokens, path)
        pattern = family(config.pattern).expression
        with told(f"data.tokenizer.pattern {pattern!r} cannot be used with {path}"):
            self.backend: Any = tiktoken.Encoding(
                path.stem,
                pat_str=pattern,
                mergeable_ranks=ranks,
                special_tokens=special_tokens,
            )
            self.backend.encode_ordinary("Any text, 1 or 2.\n")
        self._ranks, self._pattern, self._special_tokens = ranks, pattern, special_tokens
        self.vocab_size: int = self.backend.n_vocab
        self.dropped = 0
        self.token_bytes = _sizes(ranks, self.vocab_size)
        # An expression of the user's may leave out text; ours leave out none.
        self._drops = config.pattern not in (None, *FAMILIES)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        encoded = self.backend.encode_ordinary_batch(texts)
        if self._drops:
            for text, ids in zip(texts, encoded, strict=True):
                kept = sum(self.token_bytes[token] for token in ids)
                if kept < len(text.encode(errors="replace")):
                    self.dropped += len(text) - len(self.backend.decode(ids))
        return encoded

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode(ids)

    def tokenizer_json(self) -> str:
        """Content of a `tokenizer.json` that encodes alike. Raises ValueError where there is none:
        its library may not know the expression, or take it otherwise."""
        from attnres_train.data.tokenizers.byte_pairs import as_tokenizer_json

        written = as_tokenizer_json(self._ranks, self._pattern, self._special_tokens)
        for text in _PROBES:
            if written.encode(text).ids != self.backend.encode_ordinary(text):
                raise ValueError(f"tokenizers splits {text!r} otherwise")
        return written.to_str()


def read_ranks(content: bytes, path: Path) -> dict[bytes, int]:
    """Token -> rank. A line holds one of each: the token in base64, the rank in decimal.

    Not by tiktoken's own loader, which would keep an old copy of a file that has changed. Raises
    UserError for what is no such file, and where some text could not be encoded.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = _entry(line)
        except ValueError as error:
            said = f"line {number} is no tiktoken rank: {error}"
            raise UserError(f"data.tokenizer.path: {path}, {said}") from error
        if token in ranks:
            raise UserError(f"data.tokenizer.path: {path}, line {number}: {token!r} is there twice")
        ranks[token] = rank
    if not ranks:
        raise UserError(f"data.tokenizer.path: {path} is empty: it holds no rank")
    _check_ranks(ranks, path)
    return ranks


def _entry(line: bytes) -> tuple[bytes, int]:
    encoded, number = line.split()
    token = base64.b64decode(encoded, validate=True)
    if not token:
        raise ValueError("the token is empty")
    if not number.isdigit() or int(number) > MAX_ID:
        raise ValueError(f"{number[:20].decode(errors='replace')} is no rank")
    return token, int(number)


def _check_ranks(ranks: dict[bytes, int], path: Path) -> None:
    """Raise UserError for what makes tiktoken panic: ranks given twice, bytes without a rank."""
    if len(set(ranks.values())) < len(ranks):
        seen: dict[int, bytes] = {}
        for token, rank in ranks.items():
            if rank in seen:
                raise UserError(
                    f"data.tokenizer.path: {path} gives the rank {rank} twice, to {seen[rank]!r} "
                    f"and to {token!r}: take an unchanged copy of the file"
                )
            seen[rank] = token
    missing = [f"0x{byte:02x}" for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise UserError(
            f"data.tokenizer.path: {path} has no rank for {len(missing)} of the 256 single bytes "
            f"({some_of(missing)}), so not every text can be encoded: the file is cut short, or is "
            "none of tiktoken's"
        )


def _special_tokens(ranks: dict[bytes, int], path: Path, config: TokenizerConfig) -> dict[str, int]:
    """Name -> id: the user's, those of the family that ``pattern`` names, or the first after the
    ranks."""
    if config.special_tokens is not None:
        problems = list(_special_token_problems(config.special_tokens))
        if problems:
            raise UserError("; ".join(problems))
        return dict(config.special_tokens)
    if config.pattern is None:
        _check_default_pattern(ranks, path)
    named = family(config.pattern)
    if named.num_ranks not in (None, len(ranks)):
        raise UserError(
            f"data.tokenizer.path: {path} has {len(ranks):,} ranks, but data.tokenizer.pattern "
            f"{config.pattern} is for files of {named.num_ranks:,}: the file is cut short, or "
            "another's. If it is right, say its data.tokenizer.special_tokens"
        )
    if named.special_tokens:
        return dict(named.special_tokens)
    # What follows the ranks is not told by the file: an id there is taken at its word.
    given = config.eod if isinstance(config.eod, int) else -1
    return {END_OF_DOCUMENT: max(given, max(ranks.values()) + 1)}


def _check_default_pattern(ranks: dict[bytes, int], path: Path) -> None:
    """Raise UserError where the file is, by its size, of a family that splits otherwise."""
    for name, one in FAMILIES.items():
        if one.num_ranks == len(ranks):
            raise UserError(
                f"data.tokenizer.pattern is not set, and {path} has the {len(ranks):,} ranks of "
                f"{name}, which splits text otherwise than the default, gpt2's: set it to {name} "
                f"(or to gpt2, which goes on as before for a run that was begun with it)"
            )


def _special_token_problems(special_tokens: dict[str, int]) -> Iterator[str]:
    key = "data.tokenizer.special_tokens"
    if not special_tokens or "" in special_tokens:
        yield f"{key} must give names to ids, one of them for the end of a document"
    ids = list(special_tokens.values())
    twice = sorted({number for number in ids if ids.count(number) > 1})
    if twice:
        yield f"{key} gives the id {twice[0]} to more than one name"
    if max(ids, default=0) > MAX_ID:
        yield f"{key} has the id {max(ids)}: the largest possible is {MAX_ID}"


def _end_of_document(special_tokens: dict[str, int], path: Path, config: TokenizerConfig) -> int:
    """Its id: one of the special tokens, since no text is encoded to those."""
    names = some_of(f"{name} ({number})" for name, number in special_tokens.items())
    asked = config.eod
    if asked is None:
        asked = family(config.pattern).eod
        if asked not in special_tokens:
            raise UserError(
                f"data.tokenizer.eod is not set, and data.tokenizer.special_tokens has no {asked}: "
                f"say which ends a document, {names}"
            )
    if isinstance(asked, str) and asked in special_tokens:
        return special_tokens[asked]
    if asked in special_tokens.values():
        return int(asked)
    what = f"has no special token {asked}" if isinstance(asked, str) else "has no such special id"
    raise UserError(
        f"data.tokenizer.eod is {asked!r}, but {path} {what}: there are {names}. Others are named "
        "by data.tokenizer.special_tokens, or by data.tokenizer.pattern kimi or cl100k"
    )


def _check_ids(ranks: dict[bytes, int], special_tokens: dict[str, int], path: Path) -> None:
    """Raise UserError for ids given twice, and for ranks left out."""
    tokens = {rank: token for token, rank in ranks.items()}
    for name, number in special_tokens.items():
        if number in tokens:
            raise UserError(
                f"data.tokenizer.special_tokens: {name} has the id {number}, which is the rank of "
                f"{tokens[number]!r} in {path}"
            )
    # Special tokens may lie among the ranks (p50k), and further on with gaps (cl100k).
    last = max(tokens)
    below = {number for number in special_tokens.values() if number < last}
    if missing := missing_ids(tokens.keys() | below):
        raise UserError(
            f"data.tokenizer.path: {path} leaves out ranks below its last, {last}: "
            f"{some_of(missing)}, ...: lines are missing, or they are ids of "
            "data.tokenizer.special_tokens"
        )


def _sizes(ranks: dict[bytes, int], vocab_size: int) -> list[int]:
    """Bytes of each token, by id; of special tokens 0."""
    sizes = [0] * vocab_size
    for token, rank in ranks.items():
        sizes[rank] = len(token)
    return sizes
