"""What folders and globs stand for, and what of them is passed over."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
from pathlib import Path

import pytest

from attnres_train.data.corpora.reader import CorpusReader, find_corpora
from attnres_train.data.prepare import prepare
from attnres_train.errors import UserError
from tests.data.corpora.test_readers import documents, error, find
from tests.data.tiny import run_config, text_corpus, write_jsonl, write_text

LINES = b'{"text": "one"}\n{"text": "two"}\n'


def names(corpus: CorpusReader, root: Path) -> list[str]:
    return [file.relative_to(root).as_posix() for file in corpus.files]


@pytest.fixture
def fold(tmp_path: Path) -> Path:
    """A folder as they are found: compressed, in capitals, linked, hidden, foreign."""
    folder = tmp_path / "fold"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    (folder / "deep").mkdir()
    (tmp_path / "other").mkdir()
    for name in ("a.jsonl", "c.JSONL", ".ipynb_checkpoints/a-checkpoint.jsonl", ".b.jsonl"):
        (folder / name).write_bytes(LINES)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(LINES))
    (folder / "deep" / "d.jsonl").write_bytes(LINES)
    (tmp_path / "other" / "e.jsonl").write_bytes(LINES)
    (folder / "link").symlink_to(tmp_path / "other")
    (folder / "deep" / "round").symlink_to(folder)
    (folder / "notes.csv").write_text("x")
    return folder


def test_a_folder_is_all_that_it_shows(fold):
    corpus = find(kind="jsonl", path=str(fold))
    assert names(corpus, fold) == [
        "a.jsonl",
        "b.jsonl.gz",
        "c.JSONL",
        "deep/d.jsonl",
        "link/e.jsonl",
    ]
    assert documents(corpus) == ["one", "two"] * 5


def test_a_folder_means_the_same_as_a_glob(fold):
    (fold / "deep" / "round").unlink()
    found = {"folder": find(kind="jsonl", path=str(fold))}
    for pattern in ("**/*.jsonl*", "**/*.JSONL"):
        found[pattern] = find(kind="jsonl", path=str(fold / pattern))
    together = {*found["**/*.jsonl*"].files, *found["**/*.JSONL"].files}
    assert set(found["folder"].files) == together


def test_what_is_passed_over_is_told_once(fold, tmp_path, capsys):
    lines = [f"{n} some words of a document that is long enough for a sample" for n in range(40)]
    write_jsonl(fold / "a.jsonl", lines)
    config = run_config(tmp_path / "cache", [{"kind": "jsonl", "path": str(fold)}])
    prepare(config)
    told = [line for line in capsys.readouterr().err.splitlines() if "passed over" in line]
    assert len(told) == 1
    assert f"data.corpus.0.path {fold}: 1 file passed over (notes.csv): kind jsonl reads" in told[0]
    prepare(config, progress=False)
    assert "passed over" not in capsys.readouterr().err


def test_folders_that_a_glob_matches_are_told_or_read(tmp_path):
    for name in ("a", "b"):
        write_text(tmp_path / "in" / name, 1)
    assert names(find(kind="text", path=str(tmp_path / "in" / "*")), tmp_path) == [
        "in/a/000.txt",
        "in/b/000.txt",
    ]
    (tmp_path / "in" / "c.txt").write_text("c")
    corpus = find(kind="text", path=str(tmp_path / "in" / "*"))
    assert names(corpus, tmp_path) == ["in/c.txt"]
    assert "2 folders passed over" in corpus.notes[0]


def test_a_link_to_nothing_is_told(fold):
    (fold / "gone.jsonl").symlink_to("nowhere")
    assert f"there is no file {fold / 'gone.jsonl'}" in error(kind="jsonl", path=str(fold))


def test_a_folder_of_hidden_files_holds_none(tmp_path):
    (tmp_path / ".a.txt").write_text("hidden")
    assert "no *.txt or *.md in the folder" in error(kind="text", path=str(tmp_path))


def zstd(data: bytes) -> bytes:
    return pytest.importorskip("pyarrow").Codec("zstd").compress(data, asbytes=True)


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.mark.parametrize("end", COMPRESS)
@pytest.mark.parametrize("name", ["rows.jsonl{}", "rows.JSONL{}", "rows.jsonl"])
def test_compressed_jsonl_is_read_whatever_its_name(tmp_path, end, name):
    file = tmp_path / name.format(end)
    file.write_bytes(COMPRESS[end](LINES))
    assert documents(find(kind="jsonl", path=str(tmp_path))) == ["one", "two"]
    assert documents(find(kind="jsonl", path=str(file))) == ["one", "two"]


def test_several_gzip_members_are_one_file(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES) + gzip.compress(LINES))
    assert documents(find(kind="jsonl", path=str(tmp_path))) == ["one", "two", "one", "two"]


def test_a_mark_of_byte_order_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone".encode())
    (tmp_path / "a.jsonl").write_bytes("\ufeff".encode() + LINES)
    assert documents(find(kind="text", path=str(tmp_path))) == ["one"]
    assert documents(find(kind="jsonl", path=str(tmp_path))) == ["one", "two"]


def test_the_standard_library_is_walked_as_before(tmp_path, monkeypatch):
    """What the quickstart learns from depends on it: hidden files too, no capitals, no links."""
    for name in ("b.py", ".a.py", "C.PY", "deep/d.rst", "site-packages/e.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes("\ufeffx".encode())
    os.symlink(tmp_path / "deep", tmp_path / "link")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    corpus = find(kind="python-stdlib")
    assert names(corpus, tmp_path) == [".a.py", "b.py", "deep/d.rst"]
    assert documents(corpus) == ["\ufeffx"] * 3


def test_what_is_named_twice_is_told(tmp_path):
    write_text(tmp_path / "texts", 3)
    corpus = text_corpus(tmp_path / "texts") | {
        "path": [str(tmp_path / "texts"), str(tmp_path / "texts" / "00*.txt")]
    }
    (reader,) = find_corpora(run_config(tmp_path / "cache", [corpus]).data)
    assert len(reader.files) == 6
    assert reader.notes == ["data.corpus.0.path: 3 files are named twice, and read twice"]


def test_what_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    corpus = text_corpus(tmp_path) | {"path": str(tmp_path / "pipe.txt")}
    with pytest.raises(UserError, match=r"data\.corpus\.0\.path: there is no regular file \S+pipe"):
        find_corpora(run_config(tmp_path / "cache", [corpus]).data)
