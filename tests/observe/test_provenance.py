"""Where a run comes from."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from attnres_train.observe.provenance import git_state, provenance


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("GIT_DIR", "GIT_WORK_TREE"):
        monkeypatch.delenv(name, raising=False)
    git("init", "--quiet")
    (tmp_path / "code.py").write_text("one = 1\n")
    git("add", "code.py")
    return tmp_path


def git(*arguments: str) -> str:
    name = ["-c", "user.name=somebody", "-c", "user.email=nobody@example.org"]
    done = subprocess.run(["git", *name, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_commit_and_whether_it_is_all(repository):
    assert git_state() is None  # no commit yet
    git("commit", "--quiet", "-m", "first")
    clean = {"commit": git("rev-parse", "HEAD"), "dirty": False}
    assert git_state() == clean
    (repository / "runs.txt").write_text("not known to git")
    assert git_state() == clean
    (repository / "code.py").write_text("one = 2\n")
    assert provenance()["git"] == clean | {"dirty": True}


def test_outside_of_a_repository_and_without_git(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state() is None
    monkeypatch.setenv("PATH", "")
    assert git_state() is None
    assert provenance()["folder"] == str(tmp_path)
