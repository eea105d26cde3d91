from __future__ import annotations

import math
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from attnres_train.data import shards
from attnres_train.data.held_out import is_held_out
from attnres_train.data.indexed import TokenSequences
from attnres_train.data.loader import open_data
from attnres_train.data.prepare import open_tokenizer, prepare
from attnres_train.errors import UserError
from tests.data.tiny import cached, run_config, text_corpus, write_indexed, write_text


@pytest.fixture
def texts(tmp_path) -> Path:
    return write_text(tmp_path / "texts", 12)


def refusal(config) -> str:
    with pytest.raises(UserError) as caught:
        prepare(config, progress=False)
    return str(caught.value)


def test_what_is_trained_on_is_the_text(tmp_path, texts):
    config = run_config(tmp_path / "cache", [text_corpus(texts)])
    prepared = prepare(config, progress=False)
    tokenizer = open_tokenizer(config, prepared)
    assert tokenizer.vocab_size <= 300
    data = TokenSequences(prepared.sources[0].prefixes)
    for number, file in enumerate(sorted(texts.iterdir())):
        ids = data.get(number).tolist()
        assert tokenizer.decode(ids[:-1]) == file.read_text()
        assert ids[-1] == tokenizer.eod
    total = sum(data.sequence_lengths)
    assert prepared.num_tokens + prepared.num_valid_tokens == total


def test_entropy_is_that_of_the_training_documents(tmp_path, texts):
    config = run_config(tmp_path / "cache", [text_corpus(texts)], train__eval_interval=1)
    prepared = prepare(config, progress=False)
    data = TokenSequences(prepared.sources[0].prefixes)
    held_out = is_held_out(shards.text_hashes(data.prefixes), 0.25)
    assert 0 < held_out.sum() < 12
    counts = Counter()
    for number in range(12):
        if not held_out[number]:
            counts.update(data.get(number).tolist())
    shares = [count / prepared.num_tokens for count in counts.values()]
    assert prepared.unigram_entropy_nats == pytest.approx(-sum(p * math.log(p) for p in shares))
    assert 0 < prepared.unigram_entropy_nats < math.log(300)


def test_a_second_run_reuses_everything(tmp_path, texts, capsys):
    config = run_config(tmp_path / "cache", [text_corpus(texts)])
    first = prepare(config)
    told = capsys.readouterr().err
    assert "training a byte-level BPE of 300 tokens" in told
    assert "12 documents" in told and "unigram entropy" in told
    before = cached(tmp_path / "cache")
    assert prepare(config) == first
    told = capsys.readouterr().err
    assert "byte-level BPE" not in told and "indexing" not in told
    assert cached(tmp_path / "cache") == before


def test_only_what_changed_is_made_again(tmp_path, texts):
    cache, other = tmp_path / "cache", write_text(tmp_path / "other", 4, first=300)
    tokenizer = run_config(cache, [text_corpus(texts)])
    path = prepare(tokenizer, progress=False).tokenizer_path
    settings = {"data__tokenizer__kind": "file", "data__tokenizer__path": path}
    one = prepare(run_config(cache, [text_corpus(texts)], **settings), progress=False)
    before = cached(cache)
    both = run_config(cache, [text_corpus(texts), text_corpus(other)], **settings)
    two = prepare(both, progress=False)
    assert before.items() <= cached(cache).items()
    assert two.sources[0] == one.sources[0]

    (other / "000.txt").write_text("another text of this corpus, much longer than before " * 20)
    three = prepare(both, progress=False)
    assert three.sources[0] == one.sources[0]
    assert three.sources[1].digest != two.sources[1].digest
    second = open_data(both, three).train.datasets[1].dataset.dataset
    assert second.prefixes == three.sources[1].prefixes


def test_an_interrupted_run_is_resumed(tmp_path, texts, monkeypatch):
    monkeypatch.setattr(shards, "PART_BYTES", 1)
    config = run_config(tmp_path / "cache", [text_corpus(texts)])
    whole = prepare(run_config(tmp_path / "whole", [text_corpus(texts)]), progress=False)

    write_part, done = shards.write_part, []

    def failing(corpus, files, *rest):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(files)
        write_part(corpus, files, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_part", failing)
        with pytest.raises(KeyboardInterrupt):
            prepare(config, progress=False)
    parts = cached(tmp_path / "cache")
    resumed = prepare(config, progress=False)
    assert parts.items() <= cached(tmp_path / "cache").items()
    assert len(resumed.sources[0].prefixes) == 12
    assert resumed.num_tokens == whole.num_tokens
    assert resumed.unigram_entropy_nats == whole.unigram_entropy_nats


def test_runs_that_start_together_agree(tmp_path, texts, capsys):
    """As threads: the lock belongs to an open file, not to a process."""
    config = run_config(tmp_path / "cache", [text_corpus(texts)])
    with ThreadPoolExecutor(3) as threads:
        runs = [threads.submit(prepare, config) for _ in range(3)]
    assert len({str(run.result()) for run in runs}) == 1
    told = capsys.readouterr().err
    assert told.count("training a byte-level BPE") == told.count("indexing samples") == 1
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_cached_data_needs_no_torch(tmp_path, texts):
    """So that the launcher of a run starts its workers at once."""
    prepare(run_config(tmp_path / "cache", [text_corpus(texts)]), progress=False)
    code = (
        "import sys; from pathlib import Path; from tests.data.tiny import *;"
        "from attnres_train.data.prepare import prepare;"
        "prepare(run_config(Path(sys.argv[1]), [text_corpus(sys.argv[2])]));"
        "sys.exit('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "cache"), str(texts)]
    assert subprocess.run(command, check=False).returncode == 0


def test_indexed_corpora_with_a_tokenizer_and_without(tmp_path, texts):
    path = prepare(run_config(tmp_path / "cache", [text_corpus(texts)]), progress=False)
    prefixes = path.sources[0].prefixes
    corpora = [{"kind": "indexed", "path": prefixes}]
    for settings in (
        {"data__tokenizer__kind": "none"},
        {"data__tokenizer__kind": "file", "data__tokenizer__path": path.tokenizer_path},
    ):
        config = run_config(tmp_path / "cache", corpora, **settings)
        prepared = prepare(config, progress=False)
        assert prepared.num_tokens == path.num_tokens
        assert prepared.unigram_entropy_nats == pytest.approx(path.unigram_entropy_nats)
        assert (open_tokenizer(config, prepared) is None) == (prepared.tokenizer_path is None)
        assert len(open_data(config, prepared).micro_batches(0, 0, 1)) == 4
    message = refusal(run_config(tmp_path / "cache", corpora))
    assert message.startswith("data.tokenizer.kind is bpe, but every corpus is indexed")


def test_a_text_corpus_needs_a_tokenizer(tmp_path, texts):
    config = run_config(tmp_path / "cache", [text_corpus(texts)], data__tokenizer__kind="none")
    assert "data.tokenizer.kind is none, but data.corpus.0 is text" in refusal(config)


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_truncated_indexed_files_end_the_run(tmp_path, suffix):
    prefix = write_indexed(tmp_path / "x", [list(range(30))] * 4)
    file = Path(prefix + suffix)
    size = file.stat().st_size
    os.truncate(file, size - 7)
    corpora = [{"kind": "indexed", "path": prefix}]
    message = refusal(run_config(tmp_path / "cache", corpora, data__tokenizer__kind="none"))
    assert message.startswith(f"{file} is truncated: expected {size} bytes, found {size - 7}")


def test_indexed_ids_outside_the_vocabulary_end_the_run(tmp_path):
    prefix = write_indexed(tmp_path / "x", [list(range(500, 530))] * 4)
    config = run_config(
        tmp_path / "cache", [{"kind": "indexed", "path": prefix}], data__tokenizer__kind="none"
    )
    assert f"data.corpus.0 (indexed {prefix}) holds token id 529, but model.vocab_size is 512" in (
        refusal(config)
    )
    assert refusal(config), "nothing of the refused corpus is found in the cache"


def test_an_empty_indexed_corpus(tmp_path):
    prefix = write_indexed(tmp_path / "x", [])
    config = run_config(
        tmp_path / "cache", [{"kind": "indexed", "path": prefix}], data__tokenizer__kind="none"
    )
    assert refusal(config) == f"data.corpus.0 (indexed {prefix}) is empty: its files hold no token"


def test_a_tokenizer_larger_than_the_model(tmp_path, texts):
    config = run_config(tmp_path / "cache", [text_corpus(texts)], data__tokenizer__vocab_size=600)
    assert refusal(config) == (
        "data.tokenizer.vocab_size is 600, but model.vocab_size is 512: raise model.vocab_size to "
        "at least 600"
    )
    path = prepare(run_config(tmp_path / "cache", [text_corpus(texts)]), progress=False)
    config = run_config(
        tmp_path / "cache",
        [text_corpus(texts)],
        data__tokenizer__kind="file",
        data__tokenizer__path=path.tokenizer_path,
        model__vocab_size=299,
    )
    assert refusal(config) == (
        f"data.tokenizer.path {path.tokenizer_path} has a vocabulary of 300, but model.vocab_size "
        "is 299: raise model.vocab_size to at least 300"
    )


def test_a_missing_tokenizer_file(tmp_path, texts):
    config = run_config(
        tmp_path / "cache",
        [text_corpus(texts)],
        data__tokenizer__kind="file",
        data__tokenizer__path="absent.json",
    )
    assert refusal(config).startswith("data.tokenizer.path: there is no file absent.json; ")


def test_too_little_text(tmp_path):
    (tmp_path / "one.txt").write_text("short")
    config = run_config(tmp_path / "cache", [text_corpus(tmp_path / "one.txt")])
    assert "too few for one sample of train.seq_length + 1 = 17" in refusal(config)
