"""What stands in several files of the project agrees: versions, Pythons, markers, files named."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from hypothesis import settings

import attnres_train

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))


def test_one_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == attnres_train.__version__
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {
        "attr": "attnres_train.__version__"
    }
    assert attnres_train.__version__ in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_same_pythons_everywhere():
    prefix = "Programming Language :: Python :: 3."
    minors = [c.removeprefix(prefix) for c in PROJECT["project"]["classifiers"] if prefix in c]
    assert minors == ["11", "12", "13"]
    assert PROJECT["project"]["requires-python"] == f">=3.{minors[0]}"
    assert PROJECT["tool"]["mypy"]["python_version"] == f"3.{minors[0]}"
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py3{minors[0]}"
    matrix = WORKFLOW["jobs"]["check"]["strategy"]["matrix"]["python"]
    assert matrix == [f"3.{minor}" for minor in minors]
    setup = (ROOT / "scripts" / "setup.sh").read_text(encoding="utf-8")
    assert "3.1[123].*" in setup and "Python 3.11, 3.12 or 3.13" in setup


def test_the_workflow_runs_what_is_there():
    for name, command in {"check": ".ci/run", "nightly": "scripts/nightly.sh"}.items():
        job = WORKFLOW["jobs"][name]
        assert job["steps"][-1] == {"run": command}
        assert (ROOT / command).is_file()
        assert job["timeout-minutes"] <= 90


def test_slow_and_gpu_tests_are_marked_and_have_their_command():
    options = PROJECT["tool"]["pytest"]["ini_options"]
    markers = [marker.split(":")[0] for marker in options["markers"]]
    assert markers == ["gpu", "nightly"]
    assert "-m 'not gpu and not nightly'" in options["addopts"]
    assert "-m 'nightly or gpu'" in (ROOT / "scripts" / "nightly.sh").read_text(encoding="utf-8")
    for marker in markers:
        files = list((ROOT / "tests" / marker).glob("test_*.py"))
        assert files
        for file in files:
            assert f"pytest.mark.{marker}" in file.read_text(encoding="utf-8"), file


def test_no_example_has_a_deadline():
    assert settings.default.deadline is None
    for file in (ROOT / "tests").rglob("test_*.py"):
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"@settings\([^)]*deadline", text), f"{file}: see tests/conftest.py"


def test_the_image_copies_what_is_there():
    lines = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    for name in copied:
        assert (ROOT / name).exists(), name
    assert {"attnres_train", "configs", "pyproject.toml", "setup.py", "README.md"} <= set(copied)
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert not set(copied) & set(ignored)


def test_every_hook_runs_a_tool_of_the_environment():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    (repository,) = hooks["repos"]
    assert repository["repo"] == "local"
    dev = " ".join(PROJECT["project"]["optional-dependencies"]["dev"])
    for hook in repository["hooks"]:
        assert hook["language"] == "system"
        tool = hook["entry"].split()[0].removeprefix(".venv/bin/")
        assert tool in dev, tool


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "CHANGELOG.md"])
def test_pages_name_files_that_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    named = re.findall(r"`(?:\./)?((?:scripts|tests|benchmarks|configs|docs|config)/[\w/.]+)", text)
    for target in [*links, *named]:
        places = (ROOT / target, ROOT / "attnres_train" / target)
        assert any(place.exists() for place in places), target
