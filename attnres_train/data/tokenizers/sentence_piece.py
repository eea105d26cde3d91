"""Tokenizers in SentencePiece's `.model` files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attnres_train.config.data_schema import TokenizerConfig
from attnres_train.data.tokenizers.kind import FileTokenizer
from attnres_train.data.tokenizers.library import told
from attnres_train.errors import UserError
from attnres_train.words import some_of


class SentencePiece(FileTokenizer):
    """A SentencePiece `.model`. Needs sentencepiece."""

    def load(self, content: bytes, path: Path) -> Pieces:
        return Pieces(content, path, self.section)


class Pieces:
    """The backend of a SentencePiece model. Encodes on all cores."""

    def __init__(self, content: bytes, path: Path, config: TokenizerConfig) -> None:
        try:
            import sentencepiece
        except ImportError as error:
            raise UserError(
                "data.tokenizer.kind is sentencepiece, which needs the package of that name: "
                "pip install 'attnres-train[data]'"
            ) from error
        with told(f"data.tokenizer.path: {path} is no SentencePiece model"):
            self.backend: Any = sentencepiece.SentencePieceProcessor(model_proto=content)
            self.vocab_size: int = self.backend.vocab_size()
            self.unknown: int | None = self.backend.unk_id()
            # Names that nothing is encoded to, whatever a text holds.
            self.controls = {
                number: self.backend.id_to_piece(number)
                for number in range(self.vocab_size)
                if self.backend.is_control(number)
            }
        self.eod = self._end_of_document(path, config.eod)

    def _end_of_document(self, path: Path, asked: str | int | None) -> int:
        names = some_of(f"{name} ({number})" for number, name in self.controls.items()) or "none"
        if asked is None:
            end: int = self.backend.eos_id()
            if end < 0:
                raise UserError(
                    f"data.tokenizer.eod is not set, and {path} names no end of sentence: say "
                    f"which of its control symbols ends a document ({names})"
                )
            asked = end
        for number, name in self.controls.items():
            if asked in (number, name):
                return number
        raise UserError(
            f"data.tokenizer.eod is {asked!r}, but {path} has no such control symbol, and a "
            f"document may hold any other: there are {names}"
        )

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self.backend.encode(texts)

    def decode(self, ids: list[int]) -> str:
        # The library leaves control symbols out.
        text, run = "", list[int]()
        for number in ids:
            if number in self.controls:
                text += self.backend.decode(run) + self.controls[number]
                run = []
            else:
                run.append(number)
        return text + (self.backend.decode(run) if run else "")
