"""What a run folder keeps, and what makes way for another run."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from attnres_train.config.origin import Origin, read_origin
from attnres_train.data.corpora.content import digest_of
from attnres_train.data.corpora.reader import FileRow
from attnres_train.errors import UserError
from attnres_train.runs.run_folder import begin, keep_files, keep_identity, read_files


@pytest.fixture
def folder(tmp_path) -> Path:
    """Of a run that has steps but no checkpoint, and what is the user's own."""
    (tmp_path / "run" / "cache").mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    return tmp_path / "run"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_the_users_own_stays(folder, capsys):
    assert begin(folder, "never", None) is None
    assert names(folder) == ["before-1", "cache", "notes.txt", "origin.json"]
    assert names(folder / "before-1") == ["metrics.jsonl"]
    assert read_origin(folder) == Origin("never", None)
    assert "is in" in capsys.readouterr().out


def test_the_same_beginning_again_moves_nothing(folder):
    begin(folder, "never", None)
    (folder / "metrics.jsonl").write_text("{}\n")
    begin(folder, "never", None)
    assert "before-2" not in names(folder)


def test_another_beginning_makes_way_again(folder, tmp_path):
    begin(folder, "never", None)
    (folder / "metrics.jsonl").write_text("{}\n")
    other = tmp_path / "other" / "step_00000004"
    other.mkdir(parents=True)
    assert begin(folder, str(other.parent), other) == other
    assert names(folder / "before-2") == ["metrics.jsonl", "origin.json"]
    assert read_origin(folder) == Origin(str(other.parent), str(other))


def test_an_empty_folder_has_nothing_to_move(tmp_path, capsys):
    begin(tmp_path / "new", "never", None)
    assert names(tmp_path / "new") == ["origin.json"]
    assert capsys.readouterr().out == ""


def test_from_the_beginning_without_being_asked_forgets_where_it_began(folder):
    begin(folder, "never", None)
    begin(folder, "auto", None)
    assert read_origin(folder) is None


def test_what_cannot_be_moved_is_the_users_to_mend(folder, monkeypatch):
    def refuse(self, target):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(UserError, match=r"run.name: the run in \S+ cannot be moved aside"):
        begin(folder, "never", None)


def test_configurations_by_step(folder, tiny):
    first, second = tiny.config(), tiny.config("optimizer.lr=0.5")
    history = folder / "history"
    for step, config, kept in (
        (0, first, ["step_00000000.yaml"]),
        (3, first, ["step_00000000.yaml"]),
        (4, second, ["step_00000000.yaml", "step_00000004.yaml"]),
        (6, first, ["step_00000000.yaml", "step_00000004.yaml", "step_00000006.yaml"]),
        (5, second, ["step_00000000.yaml", "step_00000004.yaml"]),
        (0, second, ["step_00000000.yaml"]),
    ):
        keep_identity(folder, step, config, {}, None)
        assert names(history) == kept
    assert "lr: 0.5" in (history / "step_00000000.yaml").read_text()


def test_lists_of_files_are_read_as_they_were_kept(tmp_path):
    rows = [FileRow(f"é {number}.txt", number, "ab" * 32) for number in range(2000)]
    digest = digest_of(rows)
    keep_files(tmp_path, {digest: rows})
    (file,) = (tmp_path / "files").iterdir()
    assert file.stat().st_size < 40 * len(rows)
    assert read_files(tmp_path, digest) == rows
    assert read_files(tmp_path, "0" * 16) is None
    for damage in (file.read_bytes()[:-9], b"", b"nothing", gzip.compress(b'["a", 1, "b"]\n')):
        file.write_bytes(damage)
        assert read_files(tmp_path, digest) is None
        keep_files(tmp_path, {digest: rows})
        assert read_files(tmp_path, digest) == rows


def test_back_to_a_tokenizer_of_before_another(folder, tiny, tmp_path):
    config, kept = tiny.config(), folder / "tokenizer"
    for step, text in ((0, "first"), (4, "second")):
        (tmp_path / "tokenizer.json").write_text(text)
        keep_identity(folder, step, config, {}, str(tmp_path / "tokenizer.json"))
    assert names(kept) == ["tokenizer.json", "tokenizer.until-step_00000004.json"]
    keep_identity(folder, 2, config, {}, str(kept / "tokenizer.until-step_00000004.json"))
    assert (kept / "tokenizer.json").read_text() == "first"
    assert (kept / "tokenizer.until-step_00000002.json").read_text() == "second"
