"""What a tokenizer is trained on: text from all over the corpora, and no more than is asked for."""

from __future__ import annotations

import gzip
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnres_train.data import tokenizer_sample
from attnres_train.data.corpora.reader import CorpusReader, find_corpora
from attnres_train.data.prepare import open_tokenizer, prepare
from attnres_train.data.tokenizer_sample import places_in, sample
from tests.data.tiny import run_config, text_corpus, write_jsonl, write_text

EARLY, LATE = "the quick brown fox ", "съешь же ещё этих мягких булок "
EXCERPT, BUDGET = 200, 4000


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(tokenizer_sample, "EXCERPT_BYTES", EXCERPT)
    monkeypatch.setattr(tokenizer_sample, "SAMPLE_BYTES", BUDGET)


def readers(*corpora: dict) -> list[CorpusReader]:
    return find_corpora(run_config(Path("unused"), list(corpora)).data)


def in_a_file(kind: str, folder: Path) -> dict:
    """A corpus of one large file, the last tenth of which is in another script."""
    texts = [f"{EARLY * 5}{number}" for number in range(900)] + [LATE * 3] * 60
    file = folder / f"a.{kind}"
    if kind == "txt":
        file.write_text("\n".join(texts))
    elif kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"text": texts}), file, row_group_size=300)
    else:
        write_jsonl(file, texts)
        if kind == "jsonl.gz":
            file.write_bytes(gzip.compress(file.read_bytes(), mtime=0))
    return {"kind": {"txt": "text"}.get(kind, kind.removesuffix(".gz")), "path": str(file)}


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_a_script_that_comes_late_in_a_large_file_is_there(tmp_path, kind):
    corpora = readers(in_a_file(kind, tmp_path))
    found = list(sample(corpora))
    chars = Counter("ш" in text for text in found)
    assert sum(map(len, found)) <= BUDGET and len(found) >= 10
    assert chars[True] >= 1 and chars[False] > chars[True]
    assert "\ufffd" not in "".join(found), "no character is cut"
    assert list(sample(corpora)) == found


def test_it_is_learnt(tmp_path):
    """The first bytes alone would have taught each letter to be two tokens."""
    config = run_config(tmp_path / "cache", [in_a_file("txt", tmp_path)], {"vocab_size": 320})
    tokenizer = open_tokenizer(config, prepare(config, progress=False))
    assert tokenizer is not None
    assert len(tokenizer.encode(LATE)) < len(LATE)


def test_of_a_compressed_file_the_beginning_is_thinned(tmp_path, monkeypatch):
    """It has to be read from there: what lies 8 times as far as is taken, is reached."""
    monkeypatch.setattr(tokenizer_sample, "SAMPLE_BYTES", 16_000)
    (corpus,) = readers(in_a_file("jsonl.gz", tmp_path))
    corpus.contents[corpus.files[0]] = corpus.contents[corpus.files[0]]._replace(size=25_000)
    found = list(sample([corpus]))
    assert any("ш" in text for text in found) and sum(map(len, found)) <= 20_000

    taken = []
    read = corpus.read

    def counted(file):
        for passage in read(file):
            taken.append(len(passage.text))
            yield passage

    monkeypatch.setattr(corpus, "read", counted)
    list(corpus.some_text(corpus.files[0], [0.5, 0.9], EXCERPT))
    assert sum(taken) <= 8 * 2 * EXCERPT + max(taken), "no more than 8 times is read"


def test_every_corpus_by_its_weight(tmp_path):
    texts = text_corpus(write_text(tmp_path / "texts", 12), weight=3.0)
    other = write_jsonl(tmp_path / "rows.jsonl", ["#" * 50] * 200)
    chars = Counter()
    for text in sample(readers(texts, {"kind": "jsonl", "path": str(other)})):
        chars["#" in text] += len(text)
    assert 800 <= chars[True] <= 1000
    assert 2500 <= chars[False] <= 3000


def test_a_small_corpus_whole(tmp_path):
    texts = write_text(tmp_path / "texts", 3)
    found = list(sample(readers(text_corpus(texts))))
    assert found == [file.read_text() for file in sorted(texts.iterdir())]


def test_readers_of_the_users_are_asked_for_passages(tmp_path, lab):
    """Also one that reads files of a known form in another way."""
    lab(
        "from attnres_train.data.corpora.text import Text\n\n\n"
        "class Loud(Text):\n"
        "    def passages(self, file):\n"
        "        for passage in super().passages(file):\n"
        "            yield passage._replace(text=passage.text.upper())\n"
    )
    (tmp_path / "a.txt").write_text("words of a text " * 999)
    (corpus,) = readers({"kind": "my_lab:Loud", "path": str(tmp_path / "a.txt")})
    found = list(sample([corpus]))
    assert found and all(text.isupper() for text in found)


@given(st.lists(st.integers(0, 2000), min_size=1, max_size=9), st.integers(1, 4000))
def test_there_are_no_more_places_than_asked_for(sizes, budget):
    if sum(sizes) <= budget:
        return
    places = places_in(sizes, budget)
    taken = 0
    for file, found in places.items():
        assert found == sorted(found) and all(0 <= place < 1 for place in found)
        assert len(found) == 1 or sizes[file] > 200
        taken += min(sizes[file], 200) * len(found)
    assert budget <= taken < budget + 200


@given(st.integers(2, 40))
def test_they_are_even_however_many_there_are(number):
    (found,) = places_in([10**7], number * EXCERPT).values()
    assert len(found) == number
    gaps = [after - before for before, after in zip([0, *found], [*found, 1], strict=True)]
    assert max(gaps) < 3 / number


def test_unknown_tokens_are_counted_and_told(tmp_path, capsys):
    vocabulary = '{"<|endoftext|>": 0, "[UNK]": 1, "the": 2}'
    (tmp_path / "words.json").write_text(
        '{"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, '
        f'"model": {{"type": "WordLevel", "vocab": {vocabulary}, "unk_token": "[UNK]"}}}}'
    )
    settings = {"kind": "file", "path": str(tmp_path / "words.json")}
    for words, told in (
        ("the other " * 10 + "the " * 979, ". WARNING: 10 of 1,000 tokens (1 %) are the unknown"),
        ("the other " + "the " * 1997, ". 1 of 2,000 tokens (0.05 %) are the unknown one, id 1: "),
        ("the " * 999, "1,000 tokens in 1 documents\n"),
    ):
        (tmp_path / "a.txt").write_text(words)
        prepare(run_config(tmp_path / "cache", [text_corpus(tmp_path / "a.txt")], settings))
        assert told in capsys.readouterr().err
