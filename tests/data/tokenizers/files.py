"""Small tokenizer files."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from attnres_train.config.data_schema import TokenizerConfig
from attnres_train.data.tokenizers.tokenizer import Tokenizer
from attnres_train.errors import UserError
from tests.data.tiny import sentence

BYTES = [bytes([byte]) for byte in range(256)]


def rank_lines(tokens: Iterable[bytes | tuple[bytes, int]]) -> bytes:
    """A rank file of ``tokens``, each at its place or with a rank of its own."""
    ranked = (one if isinstance(one, tuple) else (one, n) for n, one in enumerate(tokens))
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranked)


def many_ranks(number: int) -> bytes:
    """A rank file of ``number`` ranks: the bytes, and what no text holds."""
    more = (b"\xff\xfe%d" % rank for rank in range(256, number))
    return rank_lines([*BYTES, *more])


def added(name: str, number: int, special: bool = True) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": name, "special": special, **flags}


def tokenizer_json(model: Mapping[str, Any], *tokens: dict[str, Any], **more: Any) -> bytes:
    """A `tokenizer.json` of ``model``, which splits at spaces."""
    empty = dict.fromkeys(
        ("truncation", "padding", "normalizer", "post_processor", "decoder"), None
    )
    content = {"version": "1.0", **empty, "added_tokens": list(tokens)}
    content |= {"pre_tokenizer": {"type": "WhitespaceSplit"}, "model": dict(model)}
    return json.dumps(content | more).encode()


def words(vocabulary: Mapping[str, int], unknown: str = "?") -> dict[str, Any]:
    return {"type": "WordLevel", "vocab": dict(vocabulary), "unk_token": unknown}


def pieces(**options: Any) -> bytes:
    """A SentencePiece model. Skips the test where the package is missing."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([sentence(number) for number in range(200)]),
        model_writer=model,
        minloglevel=2,
        **({"vocab_size": 320, "model_type": "bpe", "byte_fallback": True} | options),
    )
    return model.getvalue()


def opened(path: Path, kind: str = "file", **settings: Any) -> Tokenizer:
    """As `prepare` opens what the configuration names by ``path``."""
    config = TokenizerConfig(kind=kind, path=str(path), **settings)
    tokenizer = Tokenizer(path / "tokenizer.json" if path.is_dir() else path, config)
    assert tokenizer.path is not None
    return tokenizer


def refusal(path: Path, kind: str = "file", **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        opened(path, kind, **settings)
    return str(caught.value)
