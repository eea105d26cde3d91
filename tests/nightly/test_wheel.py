"""What a user without a clone does: install the wheel in a new environment, train in a new folder.

Asks the package index for what the package depends on.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import attnres_train
from attnres_train.config.shipped import names, studies
from tests.tiny import environment

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")

pytestmark = pytest.mark.nightly


def run(*command: str | Path, cwd: Path) -> str:
    """What the command prints; it must succeed. It sees this repository by no path."""
    variables = {name: v for name, v in environment().items() if name != "PYTHONPATH"}
    result = subprocess.run(
        command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=3600
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as for a release: from the source distribution."""
    folder = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        shutil.copy(ROOT / name, folder)
    for name in ("attnres_train", "configs"):
        shutil.copytree(ROOT / name, folder / name)
    run(sys.executable, "-m", "build", cwd=folder)
    (wheel,) = (folder / "dist").glob("*.whl")
    assert wheel.name == f"attnres_train-{attnres_train.__version__}-py3-none-any.whl"
    return wheel


@pytest.fixture(scope="module")
def tools(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``bin/`` of an environment in which the wheel alone is installed."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", folder, cwd=folder)
    constraints = ROOT / "constraints.txt"
    run(folder / "bin" / "pip", "install", "-c", constraints, wheel, cwd=folder)
    return folder / "bin"


def test_everything_is_within(tools: Path, tmp_path: Path) -> None:
    code = "import attnres_train; print(attnres_train.__path__[0])"
    installed = Path(run(tools / "python", "-c", code, cwd=tmp_path).strip())
    assert not installed.is_relative_to(ROOT)
    kept = {file.relative_to(installed) for file in installed.rglob("*") if file.is_file()}
    package = ROOT / "attnres_train"
    modules = {file.relative_to(package) for file in package.rglob("*.py")}
    shipped = [*names(), *(f"studies/{name}" for name in studies())]
    configs = {Path("configs") / f"{name}.yaml" for name in shipped}
    wanted = modules | configs | {Path("py.typed")}
    assert {file for file in kept if file.suffix != ".pyc"} == wanted


def test_it_trains_on_the_built_in_corpus(tools: Path, tmp_path: Path) -> None:
    attnres = tools / "attnres-train"
    short = ["train.train_iters=2", "train.seq_length=32", "train.eval_interval=0"]
    screen = run(attnres, "train", "quickstart", *short, cwd=tmp_path)
    assert "step 2/2 " in screen
    assert "runs/quickstart: step 2 of 2" in run(attnres, "report", "quickstart", cwd=tmp_path)
    (tmp_path / "mine.yaml").write_text("extends: quickstart\nrun: {name: mine}\n")
    assert "2 ranks x 2 virtual stages" in run(attnres, "config", "mine.yaml", cwd=tmp_path)
