"""scripts/setup.sh with stand-ins for Python: which it takes, what it says, when it installs."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMES = ("python3", "python3.11", "python3.12", "python3.13")
# Knows its version, makes a .venv with itself as its Python, and notes what pip is asked for.
PYTHON = """#!/bin/sh
case "$*" in
    "-c "*) echo {version} ;;
    "-m venv --clear .venv") rm -rf .venv && mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    "-m pip install "*) echo "{version} $*" >> pip.log ;;
    *) exit 1 ;;
esac
"""

SetUp = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    (tmp_path / "scripts").mkdir()
    for name in ("scripts/setup.sh", "pyproject.toml", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def set_up(clone: Path) -> SetUp:
    """`set_up(python3="3.9.2")` runs the script where `python3` alone is found, of that version."""

    def run(PYTHON_: str = "", **found: str) -> subprocess.CompletedProcess[str]:
        folder = clone / "bin"
        folder.mkdir(exist_ok=True)
        for name in NAMES:
            version = found.get(name.replace(".", "_"))
            text = PYTHON.format(version=version) if version else "#!/bin/sh\nexit 127\n"
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        return subprocess.run(
            [clone / "scripts" / "setup.sh"],
            env={"PATH": f"{folder}:/usr/bin:/bin", "PYTHON": PYTHON_},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


def installs(clone: Path) -> list[str]:
    """Version of the Python of each installation."""
    log = clone / "pip.log"
    lines = log.read_text().splitlines() if log.exists() else []
    assert all("-c constraints.txt -e .[dev]" in line for line in lines)
    return [line.split()[0] for line in lines]


def test_it_says_how_much_it_downloads_before_it_does(clone, set_up):
    result = set_up(python3="3.12.1", python3_13="3.13.0")
    assert (result.returncode, result.stderr) == (0, "")
    first, *sizes = result.stdout.splitlines()
    assert first.startswith("setting up .venv with Python 3.12.1")
    assert any("0.7 GB" in line and "CPU" in line for line in sizes)
    assert any("3 GB" in line and "CUDA" in line for line in sizes)
    assert installs(clone) == ["3.12.1"]


def test_a_second_run_does_nothing_until_the_packaging_files_change(clone, set_up):
    set_up(python3="3.11.7")
    again = set_up(python3="3.11.7")
    assert (again.returncode, again.stdout, installs(clone)) == (0, "", ["3.11.7"])
    (clone / "constraints.txt").write_text("torch==2.14\n")
    changed = set_up(python3="3.11.7")
    assert changed.stdout == "bringing .venv up to date; pip downloads what has changed\n"
    assert installs(clone) == ["3.11.7"] * 2


def test_another_python3_leaves_the_venv_alone(clone, set_up):
    set_up(python3="3.11.7")
    assert set_up(python3="3.12.1").stdout == ""
    assert installs(clone) == ["3.11.7"]


def test_one_that_is_too_old_is_passed_over_in_one_line(clone, set_up):
    result = set_up(python3="3.9.18", python3_11="3.11.7", python3_12="3.12.1")
    assert result.stdout.splitlines()[0] == (
        "Python 3.11, 3.12 or 3.13 is needed, python3 is 3.9.18: taking python3.12 (3.12.1)"
    )
    assert installs(clone) == ["3.12.1"]


@pytest.mark.parametrize(
    ("found", "what"), [({"python3": "3.10.13"}, "3.10.13"), ({}, "missing")], ids=["old", "none"]
)
def test_without_a_supported_one_it_says_how_to_name_one(clone, set_up, found, what):
    result = set_up(**found)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        f"error: Python 3.11, 3.12 or 3.13 is needed, python3 is {what}: "
        "name another with PYTHON=...\n"
    )
    assert not (clone / ".venv").exists()


def test_the_one_that_is_named_is_taken_or_refused(clone, set_up):
    found = {"python3": "3.11.7", "python3_12": "3.12.1"}
    refused = set_up(PYTHON_="python3.13", **found)
    assert refused.stderr.endswith("is needed, python3.13 is missing\n")
    assert set_up(PYTHON_="python3.12", **found).returncode == 0
    assert installs(clone) == ["3.12.1"]
    refused = set_up(PYTHON_="python3", **found)
    assert refused.returncode == 2
    assert refused.stderr == "error: PYTHON is python3, .venv is of 3.12.1: remove it first\n"


def test_a_venv_whose_python_is_gone_is_made_anew(clone, set_up):
    set_up(python3="3.11.7")
    (clone / ".venv" / "bin" / "python").unlink()
    assert "setting up .venv" in set_up(python3="3.11.7").stdout
    assert installs(clone) == ["3.11.7"] * 2
