"""What is asked of every kind of corpus and tokenizer that is ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from attnres_train.config.kinds import CHOICES, resolve
from attnres_train.data.corpora.reader import corpus_readers
from attnres_train.data.prepare import prepare
from attnres_train.data.tokenizers.kind import tokenizer_kind
from attnres_train.data.tokenizers.tokenizer import Tokenizer
from tests.data.tiny import run_config, text_corpus

CORPORA = list(CHOICES["data.corpus.kind"].built_in)
TOKENIZERS = list(CHOICES["data.tokenizer.kind"].built_in)
WORDS = (
    '{"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, '
    '"model": {"type": "WordLevel", "vocab": {"<|endoftext|>": 0, "one": 1}, "unk_token": "one"}}'
)


@pytest.mark.parametrize("choice", ["data.corpus.kind", "data.tokenizer.kind"])
def test_each_says_what_it_is(choice):
    abouts = {resolve(choice, name).about() for name in CHOICES[choice].built_in}
    assert len(abouts) == len(CHOICES[choice].built_in)


def test_what_each_reads():
    reads = {name: resolve("data.corpus.kind", name).reads for name in CORPORA}
    assert reads == {
        "python-stdlib": set(),
        "text": {"path"},
        "jsonl": {"path", "text_field"},
        "parquet": {"path", "text_field"},
        "datasets": {"path", "text_field"},
        "indexed": {"path"},
    }
    holds_tokens = [name for name in CORPORA if resolve("data.corpus.kind", name).holds_tokens]
    assert holds_tokens == ["indexed"]


class TestKeysOfTheCache:
    """They depend on contents, wherever those lie: what was prepared once is found anywhere."""

    @pytest.fixture(params=["project", "deep/er"])
    def texts(self, tmp_path, monkeypatch, request):
        """A corpus whose names and contents are always the same, in folders that are not."""
        project = tmp_path / request.param
        project.mkdir(parents=True)
        monkeypatch.chdir(project)
        os.mkdir("in")
        for name in "ab":
            with open(f"in/{name}.txt", "w") as file:
                file.write("one " * 100)
        with open("words.json", "w") as file:
            file.write(WORDS)
        return "in"

    @pytest.mark.parametrize("field", ["text", "body"])
    def test_of_a_corpus(self, texts, field):
        for kind, path in (("text", "in"), ("jsonl", "in/*.txt"), ("parquet", "in/?.txt")):
            corpus = {"kind": kind, "path": path, "text_field": field}
            (reader,) = corpus_readers(run_config(texts, [corpus]).data)
            assert reader.fingerprint() == [kind, field, "2df69dd84ac2f0d0", {}, None]

    @pytest.mark.parametrize("kind", TOKENIZERS)
    def test_of_a_tokenizer(self, texts, kind):
        config = run_config("cache", [text_corpus(texts)], {"kind": kind}).data.tokenizer
        if tokenizer_kind(config).encodes_text:
            assert tokenizer_kind(config).fingerprint() == []

    def test_of_all_steps(self, texts):
        """Literals: other ones make every cache of before useless, which is to be meant."""
        settings = {"kind": "file", "path": "words.json", "vocab_size": 300}
        config = run_config("cache", [text_corpus(texts)], settings, data__split=(0.5, 0.5))
        assert Tokenizer(Path("words.json"), config.data.tokenizer).digest == "b738b32ad88b7366"
        (source,) = prepare(config, progress=False).sources
        (shards,) = Path("cache/shards").iterdir()
        (indices,) = Path("cache/indices").iterdir()
        assert (source.content, source.digest) == ("54c3f37332aabd02", shards.name)
        assert (shards.name, indices.name) == ("17c2ced1ac06a2a4", "e19e80d8e71b42fc")

    def test_of_a_trained_tokenizer(self, texts):
        prepare(run_config("cache", [text_corpus(texts)], data__split=(0.5, 0.5)), progress=False)
        (tokenizer,) = Path("cache/tokenizers").iterdir()
        assert tokenizer.name == "55b246c8abc25b23"


def test_checks_load_nothing_heavy(tmp_path):
    """Kinds are asked before any worker starts, and by commands that never read data."""
    code = f"""
import sys
from pathlib import Path
from attnres_train.config import ConfigError, RunConfig, check_config
from attnres_train.config.schema import *
corpora = [{{"kind": kind, "path": "absent"}} for kind in {CORPORA}]
for kind in {TOKENIZERS}:
    config = RunConfig.model_validate({{
        "model": {{"hidden_size": 32, "num_layers": 2, "vocab_size": 512}},
        "train": {{"train_iters": 10, "seq_length": 16, "global_batch_size": 4}},
        "data": {{"corpus": corpora, "tokenizer": {{"kind": kind, "path": "absent"}}}},
    }})
    try:
        check_config(config)
    except ConfigError as error:
        assert len(error.problems) >= {len(CORPORA)} + 1, error
    else:
        sys.exit(3)
heavy = {{"torch", "numpy", "pyarrow", "tokenizers", "tiktoken", "megatron"}} & set(sys.modules)
sys.exit(bool(heavy) and str(heavy))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=tmp_path).returncode == 0
