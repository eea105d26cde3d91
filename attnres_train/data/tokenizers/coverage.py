"""What a `tokenizer.json` has no token for: told before, or counted where the library leaves it out
without a word."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attnres_train.errors import UserError

# Models that raise an error, amid the text, where they meet what is not in their vocabulary.
_UNKNOWN_TOKEN = {
    "WordLevel": "unk_token",
    "WordPiece": "unk_token",
    "Unigram": "unk_id",
    "BPE": "unk_token",
}


def check_unknown_token(written: dict[str, Any], path: Path) -> None:
    """Raise UserError where the model of a `tokenizer.json`, as ``written``, cannot encode every
    text."""
    model = written["model"]
    key = _UNKNOWN_TOKEN.get(model.get("type", ""))
    if key is None:
        return
    unknown = model.get(key)
    if model["type"] == "BPE":
        known = unknown is None or unknown in model["vocab"] or _covers_all(written)
    else:
        known = unknown is not None and (key == "unk_id" or unknown in model["vocab"])
    if not known:
        raise UserError(
            f"data.tokenizer.path: {path} has no token for the unknown: {key} of its "
            f"{model['type']} model is {unknown!r}, which is not in its vocabulary, so it can "
            "encode no other text"
        )


def unknown_token(model: dict[str, Any], vocabulary: dict[str, int]) -> int | None:
    """Id of the token for what has no other, if the ``model`` of a `tokenizer.json` has one."""
    key = _UNKNOWN_TOKEN.get(model.get("type", ""), "unk_token")
    found = model.get(key)
    return vocabulary.get(found) if isinstance(found, str) else found


def _covers_all(written: dict[str, Any]) -> bool:
    """Whether a BPE has a token for every byte."""
    model = written["model"]
    steps = [*_steps(written.get("pre_tokenizer")), *_steps(written.get("normalizer"))]
    if any(step.get("type") == "ByteLevel" for step in steps):
        return _has_bytes(model)
    tokens = (f"<0x{byte:02X}>" for byte in range(256))
    return bool(model.get("byte_fallback")) and all(one in model["vocab"] for one in tokens)


def is_byte_level(written: dict[str, Any]) -> bool:
    """Whether a BPE has a token for every byte, a character for each in their names, and takes the
    bytes of a text as they are: no space is put in front of it."""
    steps = [
        step for step in _steps(written.get("pre_tokenizer")) if step.get("type") == "ByteLevel"
    ]
    as_it_is = bool(steps) and not any(step.get("add_prefix_space", True) for step in steps)
    return as_it_is and _has_bytes(written["model"])


def _has_bytes(model: dict[str, Any]) -> bool:
    from tokenizers import pre_tokenizers

    marks = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    return not marks and all(one in model["vocab"] for one in pre_tokenizers.ByteLevel.alphabet())


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
        model = written["model"]
        drops = model.get("type") == "BPE" and model.get("unk_token") is None
        return cls(model, backend) if drops and not _covers_all(written) else None

    def count(self, texts: list[str]) -> None:
        """Add what is left out of ``texts``, after the tokenizer's own normalisation."""
        normalizer, pre_tokenizer = self._backend.normalizer, self._backend.pre_tokenizer
        for text in texts:
            text = normalizer.normalize_str(text) if normalizer else text
            words = [text]
            if pre_tokenizer:
                words = [word for word, _ in pre_tokenizer.pre_tokenize_str(text)]
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
