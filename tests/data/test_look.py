"""`data show`: what it says of a corpus small enough to be counted by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from attnres_train.__main__ import main
from attnres_train.config import save_config
from attnres_train.data.look import look
from attnres_train.data.prepare import open_tokenizer, prepare
from tests.data.tiny import run_config, text_corpus, write_indexed, write_jsonl

TEXTS = ["one two three", "four five six seven eight", "one two three", "nine ten"] * 5


@pytest.fixture
def config(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    more = tmp_path / "more"
    more.mkdir()
    (more / "b.txt").write_text("a longer text of its own, in words. " * 20)
    corpora = [{"kind": "jsonl", "path": str(path), "weight": 3.0}, text_corpus(more)]
    return run_config(
        tmp_path / "cache", corpora, data__mask_document_ends=True, data__reset_at_documents=True
    )


def test_corpora_are_counted(config):
    prepared = prepare(config, progress=False)
    tokenizer, found = open_tokenizer(config, prepared), look(config, prepared, batches=0)
    lines, text = found["corpora"]
    lengths = sorted(len(tokenizer.encode(one)) + 1 for one in TEXTS)
    num_bytes = sum(len(one) for one in TEXTS)
    assert (lines["share"], text["share"]) == (0.75, 0.25)
    assert (lines["documents"], lines["tokens"]) == (20, sum(lengths))
    assert (lines["bytes"], text["bytes"]) == (num_bytes, 36 * 20)
    assert lines["tokens_per_byte"] == pytest.approx((sum(lengths) - 20) / num_bytes)
    assert [lines["lengths"][name] for name in ("min", "median", "max")] == [
        lengths[0],
        lengths[9],
        lengths[-1],
    ]
    assert lines["lengths"]["mean"] == pytest.approx(sum(lengths) / 20)
    assert lines["repeated_documents"] == 20 - len(set(TEXTS))
    assert text["repeated_documents"] == 0
    assert found["repeated_documents"] == 20 - len(set(TEXTS))
    assert found["samples"] == []


def test_samples_are_decoded_with_their_borders_and_their_mask(config):
    prepared = prepare(config, progress=False)
    tokenizer, found = open_tokenizer(config, prepared), look(config, prepared, batches=6)
    keys = {sample["corpus"] for sample in found["samples"]}
    assert keys == {"data.corpus.0", "data.corpus.1"}
    end = tokenizer.decode([tokenizer.eod])
    for sample in found["samples"]:
        pieces = sample["pieces"]
        assert sum(piece["tokens"] for piece in pieces) == 16 + 1
        assert pieces[0]["tokens"] == 1 or not pieces[0]["in_loss"]
        texts = [""] * sample["documents"]
        for piece in pieces:
            texts[piece["document"]] += piece["text"]
        for number, text in enumerate(texts[:-1]):
            assert text.endswith(end) and text.count(end) == 1
            whole = text.removesuffix(end)
            assert number == 0 or sample["corpus"] == "data.corpus.1" or whole in TEXTS
        # What a document's end is to predict is left out of the loss.
        firsts = {piece["document"]: piece for piece in reversed(pieces)}
        assert not any(firsts[number]["in_loss"] for number in range(1, sample["documents"]))


def test_tokens_without_text(tmp_path):
    prefix = write_indexed(tmp_path / "tokens", [[5, 6, 7, 1]] * 3 + [list(range(2, 90))])
    config = run_config(
        tmp_path / "cache", [{"kind": "indexed", "path": prefix}], {"kind": "none", "eod": 1}
    )
    found = look(config, prepare(config, progress=False), batches=1)
    (corpus,) = found["corpora"]
    assert (corpus["documents"], corpus["repeated_documents"]) == (4, 2)
    assert corpus["bytes"] is corpus["tokens_per_byte"] is found["tokenizer"] is None
    assert all(text.isdigit() for text in found["samples"][0]["pieces"][-1]["text"].split())


def test_the_command(config, tmp_path, capsys, monkeypatch):
    path = tmp_path / "run.yaml"
    save_config(config, path)
    assert main(["data", "show", str(path), "train.micro_batch_size=2", "--batches", "2"]) == 0
    out = capsys.readouterr().out
    assert "data.corpus.0: jsonl" in out and "75.0 % of the samples" in out
    assert out.count("\nsample ") == 4 and "[not in the loss: " in out
    assert main(["data", "show", str(path), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["samples"]) == 1
    assert main(["data", str(path)]) == 0
    assert capsys.readouterr().out == ""
    assert main(["data", str(path), "--json"]) == 2
    assert "--json is for `attnres-train data show CONFIG`" in capsys.readouterr().err
    # A config may be called show.
    monkeypatch.chdir(tmp_path)
    Path("show").write_text(path.read_text())
    assert main(["data", "show"]) == 0
    assert main(["data", "show", "train.micro_batch_size=2"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["data", "show", "show"]) == 0
    assert "data.corpus.0: jsonl" in capsys.readouterr().out
