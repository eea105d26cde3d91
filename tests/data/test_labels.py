from __future__ import annotations

import pytest

from attnres_train.config.data_schema import CorpusConfig
from attnres_train.data.labels import corpus_labels


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("/data/wiki", "wiki"),
        ("/data/wiki.jsonl.zst", "wiki"),
        ("/data/v1.5/books.txt", "books"),
        ("/data/code/*.jsonl", "code"),
        ("/data/code/**/*.jsonl", "code"),
        (["/data/a.txt", "/data/b.txt"], "a"),
        (".hidden", ".hidden"),
        ("*.txt", "text"),
        (None, "text"),
    ],
)
def test_a_label_is_short(path, label):
    assert corpus_labels([CorpusConfig(kind="text", path=path)]) == [label]


def test_no_two_are_equal():
    def of(*paths: str) -> list[str]:
        return corpus_labels([CorpusConfig(kind="text", path=path) for path in paths])

    assert of("/a/text", "/b/text", "/a/code") == ["text.0", "text.1", "code"]
    names = of("/a/text", "/b/text", "/.text.1", "/c/.text.0")
    assert len({*names}) == 4
