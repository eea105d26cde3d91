"""Bytes of tokens, against the bytes of the text that was encoded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from attnres_train.data.loader import open_data
from attnres_train.data.prepare import open_tokenizer, prepare
from attnres_train.data.token_bytes import read_token_bytes, token_bytes
from attnres_train.data.tokenizers.hugging_face import train_bpe
from tests.data.tiny import run_config, sentence, text_corpus, write_text
from tests.data.tokenizers.files import (
    BYTES,
    added,
    opened,
    pieces,
    rank_lines,
    tokenizer_json,
    words,
)

TEXTS = ["", "plain text", " two  blanks\n", "Füße, 漢字 and \U0001f642", "<|endoftext|> in a text"]


def bpe(folder: Path) -> Path:
    train_bpe((sentence(number) for number in range(50)), 300, folder / "tokenizer.json")
    return folder / "tokenizer.json"


def ranks(folder: Path) -> Path:
    (folder / "a.tiktoken").write_bytes(rank_lines([*BYTES, b"te", b"text", b"\xe6\xbc"]))
    return folder / "a.tiktoken"


@pytest.mark.parametrize(("make", "kind"), [(bpe, "file"), (ranks, "tiktoken")])
def test_bytes_of_tokens_are_those_of_the_text(tmp_path, make, kind):
    tokenizer = opened(make(tmp_path), kind)
    table = token_bytes(tokenizer, 400, mean=99.0)
    assert table.shape == (400,) and table[tokenizer.eod] == 0
    assert not table[tokenizer.vocab_size :].any()
    for text in TEXTS:
        assert table[tokenizer.encode(text)].sum() == len(text.encode()), text


def test_a_word_that_is_added_and_found_in_text_counts_for_its_own_bytes(tmp_path):
    written = json.loads(bpe(tmp_path).read_text())
    number = len(written["model"]["vocab"])
    written["added_tokens"].append(added("größe", number, special=False))
    (tmp_path / "tokenizer.json").write_text(json.dumps(written))
    tokenizer = opened(tmp_path / "tokenizer.json")
    ids = tokenizer.encode("die größe da")
    assert number in ids
    assert token_bytes(tokenizer, 400, None)[ids].sum() == len("die größe da".encode())


def changing_the_text(folder: Path) -> Path:
    written = json.loads(bpe(folder).read_text()) | {"normalizer": {"type": "Lowercase"}}
    (folder / "tokenizer.json").write_text(json.dumps(written))
    return folder / "tokenizer.json"


def putting_a_space_in_front(folder: Path) -> Path:
    written = json.loads(bpe(folder).read_text())
    written["pre_tokenizer"]["add_prefix_space"] = True
    (folder / "tokenizer.json").write_text(json.dumps(written))
    return folder / "tokenizer.json"


def of_words(folder: Path) -> Path:
    content = tokenizer_json(words({"?": 0, "the": 1, "</s>": 2}), added("</s>", 2))
    (folder / "tokenizer.json").write_bytes(content)
    return folder / "tokenizer.json"


@pytest.mark.parametrize("make", [changing_the_text, putting_a_space_in_front, of_words])
def test_others_count_for_the_mean_of_the_corpora(tmp_path, make):
    tokenizer = opened(make(tmp_path))
    table = token_bytes(tokenizer, 400, mean=3.5)
    expected = np.full(400, 3.5)
    expected[[tokenizer.eod, *range(tokenizer.vocab_size, 400)]] = 0
    assert np.array_equal(table, expected)
    assert token_bytes(tokenizer, 400, mean=None) is None


def test_the_mean_is_counted_when_tokenising(tmp_path):
    (tmp_path / "a.model").write_bytes(pieces())
    texts = write_text(tmp_path / "texts", 12)
    (texts / "more.txt").write_text("Füße " * 100)
    settings = {"kind": "sentencepiece", "path": str(tmp_path / "a.model")}
    config = run_config(tmp_path / "cache", [text_corpus(texts)], settings)
    prepared = prepare(config, progress=False)
    (source,) = prepared.sources
    assert source.text_bytes == sum(file.stat().st_size for file in texts.iterdir())
    tokenizer = open_tokenizer(config, prepared)
    counted = sum(len(tokenizer.encode(file.read_text())) for file in texts.iterdir())
    assert source.text_tokens == counted
    table = read_token_bytes(prepared.token_bytes)
    assert table[5].item() == pytest.approx(source.text_bytes / counted)
    assert prepared.bytes_per_token == pytest.approx(source.text_bytes / counted)


def test_a_cache_of_before_is_read_and_what_it_lacks_is_told(tmp_path, capsys):
    """With bytes that were not counted: of exact tokens nothing is missing."""
    texts = write_text(tmp_path / "texts", 12)
    (tmp_path / "a.model").write_bytes(pieces())
    for settings in (
        {"vocab_size": 300},
        {"kind": "sentencepiece", "path": str(tmp_path / "a.model")},
    ):
        cache = tmp_path / settings.get("kind", "bpe")
        config = run_config(cache, [text_corpus(texts)], settings)
        first = prepare(config, progress=False)
        for file in cache.glob("shards/*/part_*/part.json"):
            counts = json.loads(file.read_text())
            del counts["text_bytes"]
            file.write_text(json.dumps(counts))
        capsys.readouterr()
        again = prepare(config)
        told = "validation has no bits per byte" in capsys.readouterr().err
        assert told == ("kind" in settings)
        assert again.token_bytes == (None if told else first.token_bytes)
        assert again.bytes_per_token is None
        assert again.sources[0].prefixes == first.sources[0].prefixes
        batch = open_data(config, again).micro_batches(0, 0, 1)[0]
        assert (open_data(config, again).text_bytes(batch) is None) == told


def test_only_what_counts_in_the_loss_counts_in_bytes(tmp_path):
    texts = write_text(tmp_path / "texts", 12, lines=1)
    config = run_config(tmp_path / "cache", [text_corpus(texts)], data__mask_document_ends=True)
    prepared = prepare(config, progress=False)
    data, tokenizer = open_data(config, prepared), open_tokenizer(config, prepared)
    batch = data.micro_batches(0, 0, 1)[0]
    counted = [
        0 if number == tokenizer.eod or not mask else len(tokenizer.decode([number]))
        for number, mask in zip(
            batch["labels"].flatten().tolist(), batch["loss_mask"].flatten().tolist(), strict=True
        )
    ]
    assert 0 in counted
    assert data.text_bytes(batch).flatten().tolist() == counted
