"""A corpus is what its files hold, not where they lie or when they were written."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnres_train.config.data_schema import CorpusConfig, DataConfig
from attnres_train.data import shards
from attnres_train.data.corpora import content
from attnres_train.data.corpora.content import BLOCK, NUM_BLOCKS, blocks, names_below, read_content
from attnres_train.data.corpora.reader import CorpusReader, find_corpora
from attnres_train.data.prepare import prepare
from attnres_train.errors import UserError
from tests.data.tiny import cached, run_config, text_corpus, write_indexed, write_text

SAMPLED = BLOCK * NUM_BLOCKS


def reader(path: Path | str | list[str], kind: str = "text", **more) -> CorpusReader:
    path = path if isinstance(path, list) else str(path)
    return find_corpora(DataConfig(corpus=[CorpusConfig(kind=kind, path=path)], **more))[0]


@given(st.integers(0, 1 << 45))
def test_blocks_lie_all_over_a_file(size):
    found = blocks(size)
    assert sum(length for _, length in found) == min(size, SAMPLED)
    assert found[0][0] == 0 and sum(found[-1]) == size
    ends = [offset + length for offset, length in found]
    starts = [offset for offset, _ in found]
    assert all(end <= start for end, start in zip(ends[:-1], starts[1:], strict=True))
    if size > SAMPLED:
        gaps = {b - a for a, b in itertools.pairwise(starts)}
        assert max(gaps) - min(gaps) <= 1


def test_a_large_file_costs_no_more_than_its_blocks(tmp_path, monkeypatch):
    file = tmp_path / "large.txt"
    with open(file, "wb") as stream:
        stream.truncate(20 << 30)
    read = []
    pread = os.pread
    monkeypatch.setattr(
        content.os, "pread", lambda fd, length, at: read.append(length) or pread(fd, length, at)
    )
    before = reader(file).fingerprint()
    assert sum(read) == SAMPLED
    with open(file, "r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"x")
    assert reader(file).fingerprint() != before


@pytest.mark.parametrize("size", [1, SAMPLED, SAMPLED + 1, 1_000_000])
def test_every_byte_that_is_sampled_counts(tmp_path, size):
    file = tmp_path / "file"
    file.write_bytes(bytes(size))
    known = read_content(file, full=False)
    assert known.full is None
    for offset, length in blocks(size):
        for place in {offset, offset + length - 1}:
            changed = bytearray(size)
            changed[place] = 1
            file.write_bytes(changed)
            assert read_content(file, full=False).sampled != known.sampled
    file.write_bytes(bytes(size + 1))
    assert read_content(file, full=False)[:2] != known[:2]


def test_a_byte_between_blocks_is_seen_on_request(tmp_path):
    file = tmp_path / "file.txt"
    between = blocks(1_000_000)[3][0] + BLOCK
    text = bytearray(b"a" * 1_000_000)
    file.write_bytes(text)
    sampled, full = reader(file).fingerprint(), reader(file, verify="full").fingerprint()
    assert full[:-1] == sampled
    text[between] = ord("b")
    file.write_bytes(text)
    assert reader(file).fingerprint() == sampled
    changed = reader(file, verify="full")
    assert changed.fingerprint() != full
    assert changed.identity() == sampled, "what is compared on resume is the same for both"


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = write_text(tmp_path / "project" / "corpus", 3)
    (folder / "deep").mkdir()
    (folder / "deep" / "more.txt").write_text("more")
    return folder


def test_time_and_place_do_not_count(folder, tmp_path, monkeypatch):
    known = reader(folder).fingerprint()
    for file in folder.rglob("*.txt"):
        os.utime(file, ns=(0, 1))
    assert reader(folder).fingerprint() == known
    monkeypatch.chdir(folder.parent)
    assert reader("corpus").fingerprint() == known
    assert reader("./corpus/").fingerprint() == known
    monkeypatch.chdir(folder)
    assert reader(".").fingerprint() == known
    monkeypatch.chdir(tmp_path)
    shutil.move(folder, tmp_path / "elsewhere")
    assert reader("elsewhere").fingerprint() == known
    (tmp_path / "link").symlink_to("elsewhere")
    assert reader("link").fingerprint() == known


def test_globs_lists_and_pairs_move_too(folder, tmp_path, monkeypatch):
    write_indexed(folder / "pair", [[1, 2, 3]])

    def all_of(root: Path) -> list:
        globs = reader(f"{root}/co*/0*.txt").fingerprint()
        files = reader([f"{root}/corpus/001.txt", f"{root}/corpus/deep"]).fingerprint()
        return [globs, files, reader(f"{root}/corpus/pair", "indexed").fingerprint()]

    known = all_of(folder.parent)
    assert known[0] != known[1]
    shutil.move(folder.parent, tmp_path / "moved")
    assert all_of(tmp_path / "moved") == known
    monkeypatch.chdir(tmp_path)
    assert all_of(Path("moved")) == known


def _add(folder: Path) -> None:
    (folder / "zzz.txt").write_text("")


def _remove(folder: Path) -> None:
    (folder / "001.txt").unlink()


def _rename(folder: Path) -> None:
    (folder / "002.txt").rename(folder / "003.txt")


def _rename_folder(folder: Path) -> None:
    (folder / "deep").rename(folder / "deeper")


def _swap(folder: Path) -> None:
    first, second = folder / "000.txt", folder / "001.txt"
    texts = first.read_text(), second.read_text()
    second.write_text(texts[0])
    first.write_text(texts[1])


def _one_byte(folder: Path) -> None:
    file = folder / "000.txt"
    times = file.stat()
    text = file.read_bytes()
    file.write_bytes(b"#" + text[1:])
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize(
    "change", [_add, _remove, _rename, _rename_folder, _swap, _one_byte], ids=lambda f: f.__name__
)
def test_names_and_contents_count(folder, change: Callable[[Path], None]):
    known = reader(folder)
    change(folder)
    changed = reader(folder)
    assert changed.fingerprint() != known.fingerprint()
    assert changed.identity() != known.identity()


def test_files_of_no_path_are_named_below_what_holds_them(tmp_path):
    files = [tmp_path / "a" / "b" / "x", tmp_path / "a" / "y"]
    assert names_below(files, []) == ["b/x", "y"]
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert names_below(files, [str(tmp_path / "a" / "b")]) == ["x", "y"]
    assert names_below([], ["anything"]) == []


def test_a_file_that_cannot_be_read(folder, monkeypatch):
    def denied(file, flags=None, **rest):
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(content, "read_content", denied)
    with pytest.raises(UserError, match=r"corpus\.0\.path: cannot read .*/000\.txt: .*denied"):
        reader(folder)


def test_a_touch_or_a_move_costs_nothing(folder, tmp_path):
    first = prepare(run_config(tmp_path / "cache", [text_corpus(folder)]), progress=False)
    before = cached(tmp_path / "cache")
    os.utime(folder / "000.txt")
    shutil.move(folder, tmp_path / "elsewhere")
    moved = run_config(tmp_path / "cache", [text_corpus(tmp_path / "elsewhere")])
    again = prepare(moved, progress=False)
    assert cached(tmp_path / "cache") == before
    assert again.sources[0].prefixes == first.sources[0].prefixes


def test_a_file_that_is_written_to_while_it_is_read(folder, tmp_path, monkeypatch):
    """What was read then is not kept under the name of what was there before."""
    config = run_config(tmp_path / "cache", [text_corpus(folder)])
    write_part = shards.write_part

    def disturbed(*arguments):
        with open(folder / "000.txt", "a") as stream:
            stream.write("one more line\n")
        write_part(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_part", disturbed)
        with pytest.raises(UserError, match=r"000\.txt was changed while it was read: start again"):
            prepare(config, progress=False)
    assert not list((tmp_path / "cache" / "shards").glob("*/part_?????"))
    prepared = prepare(config, progress=False)
    undisturbed = prepare(run_config(tmp_path / "other", [text_corpus(folder)]), progress=False)
    assert prepared.num_tokens == undisturbed.num_tokens
