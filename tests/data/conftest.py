"""What a user has: a folder outside the package with kinds of their own, and a YAML file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from attnres_train.config import save_config
from tests.data.tiny import run_config, text_corpus


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Path]]:
    """Makes ``my_lab.py`` of some source; other tests have another module of that name."""
    folder = tmp_path / "outside"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))

    def write(source: str) -> Path:
        file = folder / "my_lab.py"
        file.write_text(source)
        sys.modules.pop("my_lab", None)
        return file

    yield write
    sys.modules.pop("my_lab", None)


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """The YAML of a run."""
    path = tmp_path / "run.yaml"
    save_config(run_config(tmp_path / "cache", [text_corpus(tmp_path)]), path)
    return path
