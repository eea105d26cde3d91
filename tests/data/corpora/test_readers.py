from __future__ import annotations

import json
import os
import sys
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnres_train.config.data_schema import CorpusConfig, DataConfig
from attnres_train.data.corpora.reader import CorpusReader, find_corpora
from attnres_train.errors import UserError
from tests.data.tiny import write_jsonl, write_text


def find(**fields) -> CorpusReader:
    return find_corpora(DataConfig(corpus=[CorpusConfig(**fields)]))[0]


def documents(corpus: CorpusReader) -> list[str]:
    texts, parts = [], []
    for file in corpus.files:
        for passage in corpus.passages(file):
            parts.append(passage.text)
            if passage.ends_document:
                texts.append("".join(parts))
                parts = []
    assert not parts
    return texts


def error(**fields) -> str:
    with pytest.raises(UserError) as caught:
        documents(find(**fields))
    return str(caught.value)


def test_stdlib_is_the_base_installation_in_a_fixed_order():
    corpus = find(kind="python-stdlib")
    root = Path(sysconfig.get_path("stdlib"))
    names = [file.relative_to(root).as_posix() for file in corpus.files]
    assert {"json/decoder.py", "argparse.py"} <= set(names)
    assert not [name for name in names if "site-packages" in name or "__pycache__" in name]
    assert {Path(name).suffix for name in names} <= {".py", ".txt", ".rst"}
    assert corpus.files == find(kind="python-stdlib").files
    assert sum(file.stat().st_size for file in corpus.files) > 10e6


def test_stdlib_reads_files_that_are_no_utf8():
    corpus = find(kind="python-stdlib")
    source = next(file for file in corpus.files if file.name == "argparse.py")
    text = "".join(passage.text for passage in corpus.passages(source))
    assert text == source.read_text(encoding="utf-8")


def test_text_files_folders_globs_and_lists(tmp_path):
    write_text(tmp_path / "a", 2)
    (tmp_path / "a" / "image.png").write_bytes(b"\xff\xfe")
    (tmp_path / "a" / "deep").mkdir()
    (tmp_path / "a" / "deep" / "notes.md").write_text("deep")
    (tmp_path / "b[1].py").write_text("import this")

    def names(path) -> list[str]:
        found = find(kind="text", path=path)
        return [file.relative_to(tmp_path).as_posix() for file in found.files]

    assert names(str(tmp_path / "a")) == ["a/000.txt", "a/001.txt", "a/deep/notes.md"]
    assert names(str(tmp_path / "**" / "*.md")) == ["a/deep/notes.md"]
    both = [str(tmp_path / "b[1].py"), str(tmp_path / "a" / "001.txt")]
    assert names(both) == ["b[1].py", "a/001.txt"]
    assert documents(find(kind="text", path=both))[0] == "import this"


@given(st.text(alphabet="ab\n\r é𝄞", max_size=200), st.integers(1, 40))
def test_long_text_is_cut_without_loss(tmp_path_factory, text, limit):
    file = tmp_path_factory.mktemp("cut") / "text.txt"
    file.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("attnres_train.data.corpora.text.PASSAGE_CHARS", limit)
        passages = list(find(kind="text", path=str(file)).passages(file))
    assert "".join(passage.text for passage in passages) == text
    assert [passage.ends_document for passage in passages][:-1] == [False] * (len(passages) - 1)
    assert passages[-1].ends_document
    assert all(len(passage.text) <= 2 * limit for passage in passages)
    assert sum(passage.num_bytes for passage in passages) == len(text.encode())


def test_jsonl_rows_are_documents(tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", ["one\ntwo", "", None, "é𝄞"], field="body")
    file.write_text(file.read_text() + "\n  \n")
    corpus = find(kind="jsonl", path=str(file), text_field="body")
    assert documents(corpus) == ["one\ntwo", "", "", "é𝄞"]


def test_jsonl_half_surrogates_become_question_marks(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(r'{"text": "a\ud800b"}')
    assert documents(find(kind="jsonl", path=str(file))) == ["a?b"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "line 2: not valid JSON"),
        ("[1]", "line 2: not a JSON object"),
        ('{"body": 1, "id": 2}', 'line 2: there is no field "text" but body, id: set '),
        ('{"text": 3}', 'line 2: the field "text" is int, not text'),
        ("\xff", "line 2: not valid JSON"),
    ],
)
def test_jsonl_errors_name_file_and_line(tmp_path, line, message):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"text": "fine"}\n' + line.encode("latin-1") + b"\n")
    told = error(kind="jsonl", path=str(file))
    assert f"{file}, {message}" in told
    assert "set " not in message or "data.corpus.0.text_field" in told


def test_parquet_rows_are_documents(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"id": [1, 2, 3], "text": ["one", None, "three"]})
    file = tmp_path / "rows.parquet"
    parquet.write_table(table, file)
    corpus = find(kind="parquet", path=str(tmp_path))
    assert documents(corpus) == ["one", "", "three"]

    assert error(kind="parquet", path=str(file), text_field="body") == (
        f'{file}: there is no column "body" but id, text: set data.corpus.0.text_field'
    )
    assert f'{file}, row 1: the field "id" is int' in error(
        kind="parquet", path=str(file), text_field="id"
    )
    file.write_bytes(file.read_bytes()[:-10])
    assert f"{file} is not a Parquet file" in error(kind="parquet", path=str(file))


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    file = tmp_path / "rows.parquet"
    file.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'attnres-train[data]'" in error(kind="parquet", path=str(file))


def test_text_that_is_no_utf8(tmp_path):
    file = tmp_path / "latin.txt"
    file.write_bytes("é".encode("latin-1"))
    assert error(kind="text", path=str(file)).startswith(f"{file} is not UTF-8 text")


@pytest.mark.parametrize(
    ("kind", "path", "message"),
    [
        ("text", None, "data.corpus.0.path is missing: a corpus of kind text needs one"),
        ("text", "absent.txt", "data.corpus.0.path: there is no file {}/absent.txt"),
        ("text", "absent*.txt", "data.corpus.0.path: there is no file {}/absent*.txt"),
        ("parquet", ".", "data.corpus.0.path: there is no *.parquet in the folder {}/."),
        ("indexed", "x", "data.corpus.0.path: there is no file {0}/x.bin and no {0}/x.idx"),
    ],
)
def test_missing_files(tmp_path, kind, path, message):
    path = None if path is None else os.path.join(tmp_path, path)
    assert error(kind=kind, path=path) == message.format(tmp_path)


def test_fingerprint_changes_with_names_and_contents(tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", ["one"])
    fields = {"kind": "jsonl", "path": str(file)}
    first = find(**fields).fingerprint()
    assert json.loads(json.dumps(first)) == first == find(**fields).fingerprint()
    assert find(**fields, text_field="body").fingerprint() != first
    assert find(**fields, weight=3).fingerprint() == first, "a weight changes no shard"
    os.utime(file, ns=(0, 1))
    assert find(**fields).fingerprint() == first, "nor does the time of a file"
    write_jsonl(file, ["two"])
    os.utime(file, ns=(0, 1))
    assert find(**fields).fingerprint() != first
    write_jsonl(file, ["one"])
    assert find(**fields).fingerprint() == first
    file.rename(tmp_path / "other.jsonl")
    assert find(kind="jsonl", path=str(tmp_path / "other.jsonl")).fingerprint() != first
