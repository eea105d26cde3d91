"""What is cached is found again by all that it depends on: each input, changed alone, makes anew
what depends on it, and nothing else."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from attnres_train.config.schema import RunConfig
from attnres_train.data import steps
from attnres_train.data.prepare import Prepared, prepare
from tests.data.test_kinds import WORDS
from tests.data.tiny import cached, run_config, text_corpus, write_indexed, write_text

# What a change may make anew, each with what follows from it.
TOKENIZER, SHARDS, INDICES, NOTHING = "tokenizer", "shards", "indices", "nothing"


class Keys(NamedTuple):
    tokenizer: str | None
    digests: list[str]
    contents: list[str]
    indices: str


def keys(prepared: Prepared) -> Keys:
    digests, contents = ([getattr(s, n) for s in prepared.sources] for n in ("digest", "content"))
    return Keys(prepared.tokenizer_path, digests, contents, prepared.indices)


def made(config: RunConfig) -> Keys:
    return keys(prepare(config, progress=False))


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_text(Path("one"), 8)
    write_text(Path("two"), 8, first=400)
    return tmp_path


def configured() -> RunConfig:
    corpora = [text_corpus("one"), text_corpus("two", weight=2.0)]
    return run_config("cache", corpora, model__vocab_size=500)


def setting(key: str, value: object) -> Callable[[RunConfig], None]:
    def change(config: RunConfig) -> None:
        *sections, name = key.split(".")
        section = config
        for part in sections:
            section = section[int(part)] if part.isdigit() else getattr(section, part)
        setattr(section, name, value)

    change.__name__ = f"{key}={value}"
    return change


def another_text(config: RunConfig) -> None:
    Path("two/003.txt").write_text("another text of this corpus " * 20)


def a_newer_format(config: RunConfig) -> None:
    steps.CACHE_VERSION += 1


CHANGES = [
    (another_text, TOKENIZER),
    (a_newer_format, TOKENIZER),
    (setting("data.tokenizer.vocab_size", 290), TOKENIZER),
    (setting("data.corpus.0.path", ["one/000.txt", "one/001.txt"]), TOKENIZER),
    (setting("data.corpus.0.text_field", "body"), TOKENIZER),
    # More of a corpus is then in the text that the tokenizer is trained on.
    (setting("data.corpus.0.weight", 3.0), TOKENIZER),
    (setting("run.seed", 7), INDICES),
    (setting("train.seq_length", 8), INDICES),
    (setting("model.vocab_size", 501), INDICES),
    (setting("train.eval_interval", 5), INDICES),
    # Without validation, nothing is held out.
    (setting("data.split", (0.5, 0.5)), NOTHING),
    (setting("train.train_iters", 11), NOTHING),
    (setting("train.global_batch_size", 8), NOTHING),
    (setting("optimizer.lr", 1.0), NOTHING),
    (setting("data.reset_at_documents", True), NOTHING),
    (setting("run.name", "other"), NOTHING),
]


@pytest.mark.parametrize(
    ("change", "first"), CHANGES, ids=[change.__name__ for change, _ in CHANGES]
)
def test_each_input_alone(project, monkeypatch, change, first):
    monkeypatch.setattr(steps, "CACHE_VERSION", steps.CACHE_VERSION)
    before, config = made(configured()), configured()
    files = cached(Path("cache"))
    change(config)
    after = made(config)
    anew = [TOKENIZER, SHARDS, INDICES, NOTHING].index(first)
    assert (after.tokenizer != before.tokenizer) == (anew == 0)
    if first == TOKENIZER:
        assert after.digests != before.digests or after.indices != before.indices
    else:
        assert (after.digests[0] != before.digests[0]) == (anew == 1)
        assert (after.digests[1] != before.digests[1]) == (anew == 1)
    assert (after.indices != before.indices) == (anew <= 2)
    assert files.items() <= cached(Path("cache")).items(), "what was there stays"
    if first == NOTHING:
        assert cached(Path("cache")) == files
    assert made(configured()) == before or change in (another_text, a_newer_format)


def test_what_is_held_out_is_an_input(project):
    validated, more = configured(), configured()
    validated.train.eval_interval = more.train.eval_interval = 5
    more.data.split = (0.5, 0.5)
    often = validated.model_copy(deep=True)
    often.train.eval_interval = 1
    assert made(more).indices != made(validated).indices
    assert made(often) == made(validated), "how often it is validated is none"


def test_content_stands_for_tokens_whatever_the_cache(project, monkeypatch):
    """What a resumed run compares: not the format of the cache, nor how closely files are read."""
    before = made(configured())
    closely = configured()
    closely.data.verify = "full"
    after = made(closely)
    assert after.digests != before.digests and after.indices != before.indices
    assert after.contents == before.contents
    monkeypatch.setattr(steps, "CACHE_VERSION", steps.CACHE_VERSION + 1)
    after = made(configured())
    assert after.digests != before.digests and after.contents == before.contents
    reweighted = configured()
    reweighted.data.tokenizer.kind, reweighted.data.tokenizer.path = "file", before.tokenizer
    known = made(reweighted)
    assert known.contents == before.contents
    reweighted.data.corpus[0].weight = 9.0
    assert made(reweighted).contents == known.contents
    reweighted.data.corpus.reverse()
    assert made(reweighted).contents == known.contents[::-1]


def test_the_file_of_a_tokenizer(project):
    corpora = [
        text_corpus("one"),
        {"kind": "indexed", "path": write_indexed(Path("x"), [[1] * 99])},
    ]
    config = run_config("cache", corpora, {"kind": "file", "path": "words.json"})
    Path("words.json").write_text(WORDS)
    before = made(config)
    Path("words.json").rename("moved.json")
    config.data.tokenizer.path = "moved.json"
    assert made(config)[1:] == before[1:], "a tokenizer is its content, too"
    Path("moved.json").write_text(WORDS.replace('"one": 1', '"one": 1, "the": 2'))
    after = made(config)
    assert after.digests[0] != before.digests[0] and after.contents[0] != before.contents[0]
    assert after.digests[1] == before.digests[1], "tokens need no tokenizer"
    assert after.indices != before.indices


@pytest.fixture
def by_ranks(project) -> RunConfig:
    """A corpus with a rank file, which says neither how text is split nor what ends a document."""
    pytest.importorskip("tiktoken")
    ranks = [bytes([byte]) for byte in range(256)] + [b" q", b"qu", b"e "]
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(ranks)]
    Path("ranks.tiktoken").write_text("\n".join(lines))
    settings = {"kind": "tiktoken", "path": "ranks.tiktoken"}
    return run_config("cache", [text_corpus("one")], settings)


def test_the_expression_that_splits_text(by_ranks):
    """(composer PR#1061) The shards of one were used for another."""
    before = prepare(by_ranks, progress=False)
    by_ranks.data.tokenizer.pattern = r"(?s).+"
    after = prepare(by_ranks, progress=False)
    assert after.num_tokens != before.num_tokens
    assert after.sources[0].digest != before.sources[0].digest
    assert after.sources[0].content != before.sources[0].content


def test_the_token_that_ends_a_document(by_ranks):
    before = prepare(by_ranks, progress=False)
    by_ranks.data.tokenizer.eod = 300
    after = prepare(by_ranks, progress=False)
    assert (before.eod, after.eod) == (259, 300)
    assert after.num_tokens == before.num_tokens
    assert after.sources[0].digest != before.sources[0].digest
    assert after.sources[0].content != before.sources[0].content
