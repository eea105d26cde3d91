"""Which token ends a document, and whether anything needs to know."""

from __future__ import annotations

import pytest

from attnres_train.config.data_schema import TokenizerConfig
from attnres_train.data.loader import open_data
from attnres_train.data.prepare import open_tokenizer, prepare
from attnres_train.errors import UserError
from tests.data.tiny import run_config, text_corpus, write_indexed, write_text


@pytest.fixture
def indexed(tmp_path):
    """A configuration of token files alone, whose documents end with 7."""
    prefix = write_indexed(tmp_path / "tokens", [[1, 2, 3, 7]] * 20)

    def configured(eod, **changes):
        corpora = [{"kind": "indexed", "path": prefix}]
        config = run_config(tmp_path / "cache", corpora, **changes)
        config.data.tokenizer = TokenizerConfig(kind="none", eod=eod)
        return config

    return configured


@pytest.mark.parametrize("key", ["reset_at_documents", "mask_document_ends"])
def test_unknown(indexed, key):
    with pytest.raises(UserError) as caught:
        prepare(indexed(None, **{f"data__{key}": True}), progress=False)
    says = str(caught.value)
    assert f"data.{key} needs the token that ends a document" in says
    assert "data.tokenizer.kind is none and data.tokenizer.eod is not set: set it" in says


@pytest.mark.parametrize("eod", ["</s>", 512, -1])
def test_no_id(indexed, eod):
    with pytest.raises(UserError) as caught:
        prepare(indexed(eod, data__reset_at_documents=True), progress=False)
    assert f"data.tokenizer.eod is {eod!r}, no id below model.vocab_size" in str(caught.value)


def test_not_needed(indexed):
    assert prepare(indexed(None), progress=False).eod is None
    assert prepare(indexed("</s>"), progress=False).eod is None


def test_named_by_id(indexed):
    config = indexed(7, data__reset_at_documents=True)
    prepared = prepare(config, progress=False)
    assert prepared.eod == 7
    for batch in open_data(config, prepared).micro_batches(0, 0, 1):
        inner = batch["cu_seqlens"][1:-1] - 1
        assert (batch["tokens"].flatten()[inner.long()] == 7).all()
        assert len(inner) >= 3


def test_of_the_tokenizer(tmp_path):
    config = run_config(tmp_path / "cache", [text_corpus(write_text(tmp_path / "texts", 12))])
    prepared = prepare(config, progress=False)
    assert prepared.eod == open_tokenizer(config, prepared).eod
