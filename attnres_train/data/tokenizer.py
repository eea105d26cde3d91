"""Tokenizers: train a byte-level BPE, load a ``tokenizer.json`` or a tiktoken rank file."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from attnres_train.config.schema import TokenizerConfig
from attnres_train.errors import UserError

END_OF_DOCUMENT = "<|endoftext|>"
# Looked up in a `tokenizer.json` in this order, where `data.tokenizer.eod` says nothing.
USUAL_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|im_end|>")
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Tokenizer:
    """Text to token ids and back.

    Text is text: a special token's name inside a document becomes ordinary tokens, so no document
    can end itself. ``eod`` is the id that ends a document, ``vocab_size`` the largest id plus one,
    ``digest`` stands for the file's content.
    """

    def __init__(self, path: Path, config: TokenizerConfig) -> None:
        """Load ``path``, written by `train_bpe` or brought by the user.

        Raises UserError when the file is broken or its end-of-document token is unknown.
        """
        content = path.read_bytes()
        self.path = path
        self.digest = hashlib.sha256(content).hexdigest()[:16]
        backend = _Tiktoken if config.kind == "tiktoken" else _HuggingFace
        self._backend = backend(content, path, config)
        self.vocab_size: int = self._backend.vocab_size
        self.eod: int = self._backend.eod
        if not 0 <= self.eod < self.vocab_size:
            raise UserError(
                f"data.tokenizer.eod is {self.eod}, but {path} has the ids 0 to "
                f"{self.vocab_size - 1}"
            )

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Encode on all cores."""
        return self._backend.encode_batch(texts)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; special tokens by name, broken UTF-8 as U+FFFD."""
        return self._backend.decode(list(ids))


def train_bpe(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Train a byte-level BPE of ``vocab_size`` tokens into ``path``; fewer when ``texts`` is small.

    Every byte is a token, so any text can be encoded.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.save(str(path))


class _HuggingFace:
    def __init__(self, content: bytes, path: Path, config: TokenizerConfig) -> None:
        from tokenizers import Tokenizer as Backend

        try:
            self.backend = Backend.from_str(content.decode())
        # The library raises bare Exceptions.
        except Exception as error:
            raise UserError(f"data.tokenizer.path: {path} is no tokenizer.json: {error}") from error
        self.backend.encode_special_tokens = True
        self.backend.no_truncation()
        self.backend.no_padding()
        vocabulary = self.backend.get_vocab()
        self.vocab_size = max(vocabulary.values()) + 1
        self.eod = (
            config.eod if isinstance(config.eod, int) else _find(vocabulary, path, config.eod)
        )

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        # "fast": without each token's place in the text.
        return [e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=False)


def _find(vocabulary: dict[str, int], path: Path, name: str | None) -> int:
    """Id of the end-of-document token."""
    for candidate in [name] if name else USUAL_ENDS:
        if candidate in vocabulary:
            return vocabulary[candidate]
    looked = name or "any of " + " ".join(USUAL_ENDS)
    raise UserError(f"data.tokenizer.eod: {path} has no token {looked}: name the one to use")


class _Tiktoken:
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
        self.vocab_size = self.backend.n_vocab

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
