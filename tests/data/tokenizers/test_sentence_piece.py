"""SentencePiece models."""

from __future__ import annotations

import sys

import pytest

from attnres_train.config import check_config
from attnres_train.data.prepare import prepare
from tests.data.tiny import run_config, sentence, text_corpus, write_text
from tests.data.tokenizers.files import opened, pieces, refusal


@pytest.fixture
def model(tmp_path):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(pieces(control_symbols=["<turn>"], user_defined_symbols=["<mine>"]))
    return file


def test_text_and_back(model):
    tokenizer = opened(model, "sentencepiece")
    assert (tokenizer.vocab_size, tokenizer.eod) == (320, 2)
    for text in (sentence(3), "é 中文 𝄞", ""):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= one < 320 for one in ids)
    assert len(tokenizer.encode(sentence(3))) < len(sentence(3)) / 2
    the = tokenizer.encode("the")
    assert tokenizer.decode([*the, 2, *the]) == "the</s>the"


def test_what_ends_a_document(model):
    assert opened(model, "sentencepiece", eod="</s>").eod == 2
    turn = opened(model, "sentencepiece", eod="<turn>").eod
    assert opened(model, "sentencepiece", eod=turn).eod == turn
    for eod in ("<mine>", "<unk>", "the", "<0x0A>", 319, 5000):
        told = refusal(model, "sentencepiece", eod=eod)
        assert told.startswith(f"data.tokenizer.eod is {eod!r}, but {model} has no such control")
        assert "</s> (2)" in told and f"<turn> ({turn})" in told


def test_no_document_can_contain_it(model):
    for eod in ("</s>", "<turn>"):
        tokenizer = opened(model, "sentencepiece", eod=eod)
        for text in (eod, f"a {eod} b", f"a{eod}b"):
            assert tokenizer.eod not in tokenizer.encode(text)
            assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode([tokenizer.eod]) == eod


def test_a_whole_preparation(model, tmp_path):
    corpus = text_corpus(write_text(tmp_path / "texts", 8))
    settings = {"kind": "sentencepiece", "path": str(model)}
    config = run_config(tmp_path / "cache", [corpus], settings)
    check_config(config)
    prepared = prepare(config, progress=False)
    assert (prepared.tokenizer_path, prepared.eod) == (str(model), 2)


def test_sentencepiece_absent(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (tmp_path / "model").write_bytes(b"x")
    assert "pip install 'attnres-train[data]'" in refusal(tmp_path / "model", "sentencepiece")
