"""Every command in README.md and docs/ runs, as it stands there, from the repository's root."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Training commands run with these overrides: the pages' runs take minutes.
SHORT = [
    "train.train_iters=2",
    "train.global_batch_size=2",
    "train.seq_length=32",
    "train.eval_interval=0",
    "model.hidden_size=16",
]
# Commands that other tests or the suite itself run.
ELSEWHERE = {
    "./scripts/test.sh": "is running",
    "./scripts/quickstart.sh": "tests/launch",
}


def commands(page: Path) -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def yaml_files(page: Path) -> dict[str, str]:
    """Files that a page shows: YAML blocks whose first line is `# NAME`."""
    blocks = re.findall(r"^```yaml\n# (\S+)\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)
    return dict(blocks)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """A copy of what the commands touch: the repository's files, this interpreter as `.venv`."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("configs", "launch", "scripts", "benchmarks", "README.md"):
        (folder / name).symlink_to(ROOT / name)
    tools = folder / ".venv" / "bin"
    tools.mkdir(parents=True)
    for name, command in {"attnres-train": "-m attnres_train", "python": ""}.items():
        script = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {command} "$@"\n'
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    (folder / "corpus").mkdir()
    (folder / "corpus" / "a.jsonl").write_text('{"text": "one document"}\n')
    for page in PAGES:
        for name, text in yaml_files(page).items():
            (folder / name).write_text(text)
    return folder


def shortened(command: str) -> list[str]:
    """The command with overrides that keep its work small; every other word as it stands."""
    words = shlex.split(command)
    if words[0].endswith("attnres-train") and words[1] in ("train", "data"):
        corpus = "data.corpus=[{kind: text, path: README.md}]"
        words += [*SHORT, corpus, "data.split=[0.8, 0.2]", "data.tokenizer.vocab_size=300"]
    if "benchmarks/" in command:
        words.append("--quick")
    return words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_run(page: Path, workspace: Path) -> None:
    for command in commands(page):
        if command.split("#")[0].strip() in ELSEWHERE:
            continue
        result = subprocess.run(
            shortened(command), cwd=workspace, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"


def test_pages_name_files_that_exist() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_parsers_find_what_the_pages_show() -> None:
    assert "./scripts/quickstart.sh" in commands(ROOT / "README.md")
    assert "my.yaml" in yaml_files(ROOT / "README.md")
