"""What the tests of the loader share."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnres_train.config import ConfigError, load_config


def error_of(path: Path, *overrides: str) -> str:
    """The message of the ConfigError that loading ``path`` ends in."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def says(problems: list[str], *parts: str) -> None:
    """There is exactly one problem, and its text has every part."""
    assert len(problems) == 1, problems
    for part in parts:
        assert part in problems[0]
