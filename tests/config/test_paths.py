"""`~` and `$NAME` mean the same in every path of a configuration."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from attnres_train.config import ConfigError, load_config
from attnres_train.config.paths import expanded
from tests.config.helpers import error_of, write

PATHS = {
    "run.dir": "run.dir={}",
    "data.cache_dir": "data.cache_dir={}",
    "data.corpus.0.path": 'data.corpus=[{{kind: text, path: "{}"}}]',
    "data.tokenizer.path": "data.tokenizer.path={}",
    "checkpoint.resume": "checkpoint.resume={}",
    "checkpoint.load": "checkpoint.load={}",
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.delenv("NOT_THERE", raising=False)
    return tmp_path


@pytest.mark.parametrize("key", PATHS)
def test_every_path_is_expanded(small_file, home, key):
    def value(written: str) -> str:
        config = load_config(small_file, [PATHS[key].format(written)])
        steps = [int(step) if step.isdigit() else step for step in key.split(".")]
        return functools.reduce(
            lambda at, step: at[step] if isinstance(step, int) else getattr(at, step), steps, config
        )

    assert value("~/some") == f"{home}/some"
    assert value("$SCRATCH/some") == value("${SCRATCH}/some") == f"{home}/scratch/some"
    assert value("plain/some") == "plain/some"


@pytest.mark.parametrize("key", PATHS)
def test_a_variable_that_is_not_there_is_told_with_its_key(small_file, home, key):
    told = error_of(small_file, PATHS[key].format("$NOT_THERE/some"))
    assert told.startswith(f"{key} (command line) is ")
    assert told.endswith("the environment has no variable NOT_THERE")


def test_lists_of_paths_are_expanded_one_by_one(small_file, home):
    config = load_config(small_file, ["data.corpus=[{kind: text, path: [~/a, $SCRATCH/b, c]}]"])
    assert config.data.corpus[0].path == [f"{home}/a", f"{home}/scratch/b", "c"]


def test_extends_is_a_path_too(small_file, home):
    write(home, "bases/base.yaml", small_file.read_text())
    for base in ("~/bases/base.yaml", "$HOME/bases/base.yaml"):
        file = write(home, "elsewhere/mine.yaml", f"extends: {base}\nrun: {{name: mine}}\n")
        assert load_config(file).model.hidden_size == 64
    file = write(home, "elsewhere/mine.yaml", "extends: $NOT_THERE/base.yaml\n")
    with pytest.raises(ConfigError, match=r"extends \(.*mine.yaml:1\) .*no variable NOT_THERE"):
        load_config(file)


def test_a_file_that_is_called_so_is_meant(home, monkeypatch):
    monkeypatch.chdir(home)
    (home / "a$NOT_THERE").touch()
    (home / "~no-such-user").touch()
    assert expanded("a$NOT_THERE") == "a$NOT_THERE"
    assert expanded("~no-such-user") == "~no-such-user"
    with pytest.raises(ValueError, match="there is no user nobody-here"):
        expanded("~nobody-here/runs")


def test_what_can_be_no_path_and_no_layer_count(small_file):
    assert error_of(small_file, r'run.dir="a\0b"').endswith("no path can hold a NUL")
    assert "an integer of at least 1 and at most 10000" in error_of(
        small_file, "model.num_layers=1000000000000"
    )


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (r'"a\0b"', "a folder's name cannot hold the character U+0000"),
        (r'"a\nb"', "a folder's name cannot hold the character U+000A"),
        ("/tmp/a", "a folder below run.dir has no"),
        ("sweep/", "a folder below run.dir has no"),
        ("../a", "a folder below run.dir has no"),
        ("x" * 256, "a folder's name cannot be longer than 255 bytes"),
    ],
)
def test_names_that_no_folder_below_another_can_have(small_file, name, told):
    found = error_of(small_file, f"run.name={name}")
    assert found.startswith("run.name (command line) is ") and told in found


def test_a_name_of_several_folders(small_file):
    assert load_config(small_file, ["run.name=sweep/é 1"]).run.name == "sweep/é 1"


def test_options_without_a_kind_and_modules_without_a_file(small_file):
    """Found by the fuzz: both were tracebacks."""
    assert "log.observers.0.kind: missing" in error_of(small_file, "log.observers.0.options=false")
    told = error_of(small_file, "log.observers=['sys:Nothing']")
    assert "module sys (built into Python) has no Nothing" in told
