"""The tokenizer of a run, whatever its kind."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from attnres_train.config.data_schema import TokenizerConfig
from attnres_train.data.cache import digest
from attnres_train.data.own_code import errors_of
from attnres_train.data.tokenizers.kind import tokenizer_kind
from attnres_train.data.tokenizers.library import read_bytes
from attnres_train.errors import UserError


class Tokenizer:
    """Text to token ids and back.

    Text is text: a special token's name inside a document becomes ordinary tokens, so no document
    can end itself. ``eod`` is the id that ends a document, ``vocab_size`` the largest id plus one,
    ``digest`` stands for all that its tokens depend on (but ``eod``).
    """

    def __init__(self, path: Path | None, config: TokenizerConfig) -> None:
        """Open the tokenizer that ``config`` names with its file, the user's or the trained one;
        None for a kind that has none.

        Raises UserError when the file is broken or its end-of-document token is unknown.
        """
        self.path = path
        self.kind = tokenizer_kind(config)
        content = hashlib.sha256(read_bytes(path) if path else b"").hexdigest()[:16]
        more = self.kind.fingerprint()
        self.digest = digest([content, more]) if more else content
        with errors_of(self.kind, f"opening {path or 'the tokenizer'}"):
            self._backend = self.kind.open(path)
            self.vocab_size, self.eod = self._backend.vocab_size, self._backend.eod
        if not 0 <= self.eod < self.vocab_size:
            raise UserError(
                f"data.tokenizer.eod is {self.eod}, but {self.source} has the ids 0 to "
                f"{self.vocab_size - 1}"
            )

    @property
    def source(self) -> str:
        """For messages: the file, or the kind where there is none."""
        return str(self.path or self.kind.kind)

    @property
    def dropped(self) -> int:
        """Characters of the texts so far that it left out, for want of a token."""
        return getattr(self._backend, "dropped", 0)

    @property
    def unknown(self) -> int | None:
        """Id of the token that stands for text which has no other, if there is one."""
        return getattr(self._backend, "unknown", None)

    @property
    def token_bytes(self) -> list[int] | None:
        """Bytes of text of each id, 0 for special tokens; None where tokens are not bytes of the
        text as it was."""
        return getattr(self._backend, "token_bytes", None)

    def tokenizer_json(self) -> str:
        """Content of a Hugging Face `tokenizer.json` that encodes alike. Raises ValueError, with
        the reason, where there is none."""
        write = getattr(self._backend, "tokenizer_json", None)
        if write is None:
            raise ValueError(f"data.tokenizer.kind {self.kind.kind} has no such form")
        return write()

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text; our own kinds encode on all cores."""
        with errors_of(self.kind, self._doing("encoding")):
            encoded = self._backend.encode_batch(texts)
            if len(encoded) != len(texts):
                raise UserError(
                    f"data.tokenizer.kind {self.kind.kind} gave {len(encoded)} lists of ids for "
                    f"{len(texts)} texts"
                )
            if any(self.eod in ids for ids in encoded):
                raise UserError(
                    f"data.tokenizer.eod is {self.eod}, but {self.source} encodes a text to it, so "
                    "a document would end early: choose a token that no text is encoded to"
                )
            return encoded

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; special tokens by name, broken UTF-8 as U+FFFD."""
        with errors_of(self.kind, self._doing("decoding")):
            return self._backend.decode(list(ids))

    def _doing(self, what: str) -> str:
        return f"{what} with {self.path}" if self.path else what
