"""Configurations that come with the package are found by their names, from any folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnres_train.config import load_config
from attnres_train.config.shipped import folder, names
from tests.config.helpers import error_of, write

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_in_the_repository_they_are_configs():
    assert folder() == CONFIGS
    assert {"quickstart", "base/table2", "variants/mhc_lite"} <= set(names())


@pytest.mark.parametrize("name", ["quickstart", "variants/mhc_lite"])
def test_by_name(name):
    assert load_config(name) == load_config(CONFIGS / f"{name}.yaml")


def test_a_file_of_the_users_comes_first(tmp_path, small_file):
    (tmp_path / "quickstart").write_text("extends: small.yaml\nrun: {name: mine}\n")
    assert load_config("quickstart").run.name == "mine"


def test_a_folder_of_that_name_is_not_in_the_way(tmp_path):
    (tmp_path / "quickstart").mkdir()
    assert load_config("quickstart").run.name == "quickstart"


def test_extends(tmp_path):
    mine = write(tmp_path, "mine.yaml", "extends: quickstart\nrun: {name: mine}\n")
    config = load_config(mine)
    assert config.run.name == "mine"
    assert config.model == load_config("quickstart").model


def test_a_name_that_is_none(tmp_path):
    mine = write(tmp_path, "mine.yaml", "extends: quikstart\n")
    assert f"there is no file {tmp_path / 'quikstart'}; near by: " in error_of(mine)
