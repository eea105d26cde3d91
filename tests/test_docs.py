"""Every command in README.md and docs/ runs, as it stands there, from the repository's root."""

from __future__ import annotations

import importlib.util
import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from attnres_train.checkpoint.folders import step_name
from attnres_train.checkpoint.manifest import read_manifest
from attnres_train.observe.sinks import read_records

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
# On this page nothing is changed but the number of steps.
EXTENDING = ROOT / "docs" / "extending.md"
# For a file that a page shows not even that: its run is stopped early, so that all that depends on
# its length (samples of each corpus, validation, learning rate) is as printed.
AS_PRINTED = ("my.yaml", "notes.yaml")
STOPPED = "train.stop_after=2"
# Commands that other tests or the suite itself run.
ELSEWHERE = {
    "./scripts/test.sh": "is running",
    "./scripts/quickstart.sh": "tests/launch",
}


def commands(page: Path) -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def files(page: Path) -> dict[str, str]:
    """Files that a page shows: YAML and Python blocks whose first line is `# NAME`."""
    text = page.read_text(encoding="utf-8")
    return dict(re.findall(r"^```(?:yaml|python)\n# (\S+)\n(.*?)^```", text, re.M | re.S))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """A copy of what the commands touch: the repository's files, this interpreter as `.venv`."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(ROOT / "docs", folder / "docs")  # a command of README.md draws into it
    for name in (
        "configs",
        "launch",
        "scripts",
        "benchmarks",
        "README.md",
        "attnres_train",
    ):
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
        for name, text in files(page).items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
    return folder


def shortened(command: str, page: Path) -> list[str]:
    """The command with overrides that keep its work small; every other word as it stands."""
    words = shlex.split(command)
    trains = words[0].endswith("attnres-train") and words[1] in ("train", "data")
    if trains and page == EXTENDING:
        words.append(SHORT[0])
    elif trains and set(words) & set(AS_PRINTED):
        words.append(STOPPED)
    elif trains:
        corpus = "data.corpus=[{kind: text, path: README.md}]"
        words += [*SHORT, corpus, "data.split=[0.8, 0.2]", "data.tokenizer.vocab_size=300"]
    if trains and "configs/stages.yaml" in words:
        words += ["stages.1.train.train_iters=2", "stages.1.train.seq_length=64"]
    if "benchmarks/" in command:
        words.append("--quick")
    return words


def of_the_night(page: Path) -> Any:
    """Smoke runs of all benchmarks take minutes, and so do pages that use several runs."""
    slow = (
        "benchmarks.md",
        "checkpoints.md",
        "evaluation.md",
        "extending.md",
        "generation.md",
        "observing.md",
        "planning.md",
        "stages.md",
        "studies.md",
        "tutorial.md",
    )
    marks = [pytest.mark.nightly] * (page.name in slow)
    return pytest.param(page, marks=marks, id=page.name)


@pytest.mark.parametrize("page", [of_the_night(page) for page in PAGES])
def test_commands_run(page: Path, workspace: Path) -> None:
    for command in commands(page):
        if command.split("#")[0].strip() in ELSEWHERE:
            continue
        result = subprocess.run(
            shortened(command, page), cwd=workspace, capture_output=True, text=True, timeout=900
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"


def test_pages_name_files_that_exist() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.nightly
def test_kinds_of_your_own_have_done_what_the_page_says(workspace: Path) -> None:
    """Runs after the commands of docs/extending.md, on 2 pipeline ranks."""
    if not (workspace / "runs" / "my_lab").is_dir():
        pytest.skip("test_commands_run[extending.md] makes the runs")
    run = workspace / "runs" / "my_lab"
    last = read_records(run / "metrics.jsonl")[-1]
    norms = {key: value for key, value in last.items() if key.startswith("grad_norm/")}
    assert {"grad_norm/embed_tokens.weight", "grad_norm/layers.7", "grad_norm/lm_head.weight"} <= (
        norms.keys()
    )
    assert math.hypot(*norms.values()) == pytest.approx(last["grad_norm"], rel=1e-5)
    tensors = read_manifest(run / "checkpoints" / step_name(2)).tensors
    assert tensors["model.layers.7.mlp_res_scale"].shape == [128]
    more = read_manifest(workspace / "runs" / "my_lab_bytes" / "checkpoints" / step_name(2))
    assert "optimizer.momentum.model.layers.7.mlp_res_scale" in more.tensors
    assert more.extras["config"]["pipeline"]["schedule_options"] == {"extra": 2}


def test_each_kind_of_your_own_takes_less_than_forty_lines() -> None:
    sources = {name: text for name, text in files(EXTENDING).items() if name.endswith(".py")}
    assert len(sources) == 8
    for name, text in sources.items():
        assert text.count("\n") < 40, name
        assert "from attnres_train." not in text.replace("from attnres_train.extend ", ""), name


def test_the_parsers_find_what_the_pages_show() -> None:
    assert "./scripts/quickstart.sh" in commands(ROOT / "README.md")
    shown = {name for page in PAGES for name in files(page) if name.endswith(".yaml")}
    assert set(AS_PRINTED) <= shown


def test_every_configuration_that_a_page_shows_is_run_there() -> None:
    for page in PAGES:
        for name in files(page):
            words = {word for line in commands(page) for word in shlex.split(line)}
            assert not name.endswith(".yaml") or name in words, f"{page.name}: {name}"


def site() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "docs" / "mkdocs.yml").read_text(encoding="utf-8"))


def test_the_site_has_every_page() -> None:
    entries = [page for entry in site()["nav"] for page in entry.values()]
    named = [page for entry in entries for page in ([entry] if isinstance(entry, str) else entry)]
    assert sorted(named) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def anchors(text: str) -> set[str]:
    """Of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}


def test_headings_that_links_name_are_there() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#([^)]+)\)", text):
            other = (page.parent / target).read_text(encoding="utf-8") if target else text
            assert anchor in anchors(other), f"{page.name}: {target}#{anchor}"


@pytest.mark.nightly
def test_the_site_builds_without_a_warning(tmp_path) -> None:
    if importlib.util.find_spec("material") is None:
        pytest.skip("no mkdocs-material here: pip install 'attnres-train[docs]'")
    config = str(ROOT / "docs" / "mkdocs.yml")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", config]
    built = subprocess.run(
        [*command, "-d", str(tmp_path / "site")], capture_output=True, text=True, timeout=600
    )
    assert built.returncode == 0, built.stderr
    assert not re.search(r"^(WARNING|ERROR)", built.stderr, re.M), built.stderr
    index = (tmp_path / "site" / "tutorial" / "index.html").read_text(encoding="utf-8")
    assert "fonts.googleapis" not in index
