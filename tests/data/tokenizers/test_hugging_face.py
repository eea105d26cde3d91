"""Hugging Face's files: folders, ends of documents, characters without a token."""

from __future__ import annotations

import json

import pytest

from attnres_train.config import check_config
from attnres_train.data.prepare import prepare
from attnres_train.data.tokenizers.tokenizer import Tokenizer
from tests.data.tiny import run_config, text_corpus, write_text
from tests.data.tokenizers.files import added, opened, refusal, tokenizer_json, words

TOKENS = [added("<|endoftext|>", 2), added("<end>", 3), added("<turn>", 4)]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(tokenizer_json(words({"?": 0, "a": 1}), *TOKENS))
    return folder


def write(folder, name, **content):
    (folder / name).write_text(json.dumps(content))


class TestFolders:
    def test_what_ends_a_document(self, folder):
        assert opened(folder).eod == 2  # a usual name
        write(folder, "special_tokens_map.json", eos_token="<turn>")
        assert opened(folder).eod == 4
        write(folder, "tokenizer_config.json", eos_token={"content": "<end>", "lstrip": False})
        assert opened(folder).eod == 3
        assert opened(folder, eod="<turn>").eod == 4
        assert opened(folder, eod=2).eod == 2
        # The file by itself is what it was.
        assert opened(folder / "tokenizer.json").eod == 2

    def test_one_that_names_none(self, folder):
        write(folder, "tokenizer_config.json", eos_token=None)
        assert opened(folder).eod == 2
        write(folder, "tokenizer_config.json", eos_token="<no>")
        told = refusal(folder)
        assert told.startswith(f"data.tokenizer.eod: {folder}/tokenizer.json has no token <no>")
        assert f"`eos_token` of {folder}/tokenizer_config.json" in told and "<end> (3)" in told

    @pytest.mark.parametrize("content", ["", "{", "[1]"])
    def test_broken_settings(self, folder, content):
        (folder / "tokenizer_config.json").write_text(content)
        told = refusal(folder)
        assert told.startswith(f"data.tokenizer.path: {folder}/tokenizer_config.json")

    def test_a_whole_preparation(self, folder, tmp_path):
        write(folder, "tokenizer_config.json", eos_token="<end>")
        corpus = text_corpus(write_text(tmp_path / "texts", 8))
        settings = {"kind": "file", "path": str(folder)}
        config = run_config(tmp_path / "cache", [corpus], settings)
        check_config(config)
        prepared = prepare(config, progress=False)
        assert (prepared.tokenizer_path, prepared.eod) == (f"{folder}/tokenizer.json", 3)
        tokenizer = Tokenizer(folder / "tokenizer.json", config.data.tokenizer)
        assert (tokenizer.eod, tokenizer.vocab_size) == (3, 5)


class TestEndOfDocument:
    @pytest.mark.parametrize("special", [True, False])
    def test_no_document_can_contain_it(self, tmp_path, special):
        file = tmp_path / "tokenizer.json"
        tokens = [added("<end>", 2, special), added("<other>", 3, special=False)]
        file.write_bytes(tokenizer_json(words({"?": 0, "a": 1}), *tokens))
        tokenizer = opened(file, eod="<end>")
        for text in ("<end>", "a <end> a", "a<end>a"):
            assert 2 not in tokenizer.encode(text)
        assert tokenizer.decode([2]) == "<end>"
        # Other added tokens are found in text as before.
        assert tokenizer.encode("a <other>") == [1, 3]

    def test_nor_where_the_model_has_it_among_its_words(self, tmp_path):
        """As in T5's file, where text that holds </s> would be encoded to it."""
        file = tmp_path / "tokenizer.json"
        vocabulary = [["<unk>", -9.0], ["</s>", 0.0], *([one, -1.0] for one in "</s>ab")]
        model = {"type": "Unigram", "unk_id": 0, "vocab": vocabulary}
        file.write_bytes(tokenizer_json(model, added("</s>", 1), pre_tokenizer=None))
        tokenizer = opened(file)
        assert tokenizer.eod == 1
        assert tokenizer.encode("a</s>b</s>") == [6, 2, 3, 4, 5, 7, 2, 3, 4, 5]

    def test_an_unknown_name_is_told_with_those_that_there_are(self, folder):
        told = refusal(folder, eod="<no>")
        assert "has no token <no>: name the one to use, of <|endoftext|> (2), <end> (3)" in told


def test_characters_without_a_token_are_counted_and_told(tmp_path, capsys):
    file = tmp_path / "tokenizer.json"
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    file.write_bytes(tokenizer_json(model, added("</s>", 3)))
    tokenizer = opened(file)
    assert tokenizer.encode("ab xab y") == [2, 2] and tokenizer.dropped == 2
    (tmp_path / "text.txt").write_text("ab é abz\n" * 50)
    settings = {"kind": "file", "path": str(file)}
    config = run_config(tmp_path / "cache", [text_corpus(tmp_path / "text.txt")], settings)
    config.data.split, config.train.eval_interval = (1.0, 0.0), 0
    for _ in range(2):  # when it is made, and when it is found
        prepare(config)
        told = capsys.readouterr().err
        assert (
            "WARNING: 100 of 450 characters (22 %) were left out: "
            f"data.tokenizer.path {file}" in told
        )
    file.write_bytes(tokenizer_json(model | {"unk_token": "a"}, added("</s>", 3)))
    prepare(config)
    told = capsys.readouterr().err
    assert "left out" not in told
    assert "WARNING: " in told and "are the unknown one, id 0: data.tokenizer.path" in told
