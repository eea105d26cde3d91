"""What a `tokenizer.json` has no token for: told before, or counted where the library leaves it out
without a word."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attnres_train.errors import UserError

# Models that raise an error, amid the text, where they meet what is not in their vocabulary.
_UNKNOWN_TOKEN = {"WordLevel": "unk_token", "WordPiece": "unk_token", "Unigram": "unk_id"}


def check_unknown_token(model: dict[str, Any], path: Path) -> None:
    """Raise UserError where ``model``, of a `tokenizer.json`, cannot encode every text."""
    key = _UNKNOWN_TOKEN.get(model.get("type", ""))
    if key is None:
        return
    unknown = model.get(key)
    if unknown is None or (key == "unk_token" and unknown not in model.get("vocab", {})):
        raise UserError(
            f"data.tokenizer.path: {path} has no token for the unknown: its {model['type']} model's "
            f"{key} is {unknown!r}, which is not in its vocabulary, so it can encode no other text"
        )


class Coverage:
    """Counts the characters that a BPE without an unknown token leaves out."""

    def __init__(self, model: dict[str, Any], backend: Any) -> None:
        self.dropped = 0
        self._vocabulary = set(model["vocab"])
        self._backend = backend
        self._prefix = model.get("continuing_subword_prefix") or ""
        self._suffix = model.get("end_of_word_suffix") or ""
        self._by_bytes = bool(model.get("byte_fallback"))

    @classmethod
    def of(cls, written: dict[str, Any], backend: Any) -> Coverage | None:
        """For a `tokenizer.json` as ``written``; None where it has a token for everything."""
        from tokenizers import pre_tokenizers

        model = written["model"]
        if model.get("type") != "BPE" or model.get("unk_token") is not None:
            return None
        vocabulary = model["vocab"]
        steps = [*_steps(written.get("pre_tokenizer")), *_steps(written.get("normalizer"))]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        if any(step.get("type") == "ByteLevel" for step in steps):
            if not (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")):
                return None if all(one in vocabulary for one in alphabet) else cls(model, backend)
        elif model.get("byte_fallback") and all(f"<0x{n:02X}>" in vocabulary for n in range(256)):
            return None
        return cls(model, backend)

    def count(self, texts: list[str]) -> None:
        """Add what is left out of ``texts``, after the tokenizer's own normalisation."""
        normalizer, pre_tokenizer = self._backend.normalizer, self._backend.pre_tokenizer
        for text in texts:
            text = normalizer.normalize_str(text) if normalizer else text
            words = [w for w, _ in pre_tokenizer.pre_tokenize_str(text)] if pre_tokenizer else [text]
            for word in words:
                self.dropped += sum(map(self._is_dropped, self._symbols(word)))

    def _symbols(self, word: str) -> Iterator[str]:
        """What merging begins with."""
        if word in self._vocabulary:
            return
        last = len(word) - 1
        for place, character in enumerate(word):
            prefix = self._prefix if place else ""
            yield prefix + character + (self._suffix if place == last else "")

    def _is_dropped(self, symbol: str) -> bool:
        if symbol in self._vocabulary:
            return False
        pieces = [f"<0x{byte:02X}>" for byte in symbol.encode(errors="replace")]
        return not (self._by_bytes and all(piece in self._vocabulary for piece in pieces))


def _steps(step: Any) -> Iterator[dict[str, Any]]:
    """A normalizer or pre-tokenizer, and those within it."""
    if isinstance(step, dict):
        yield step
        for inner in (*step.get("pretokenizers", ()), *step.get("normalizers", ())):
            yield from _steps(inner)
