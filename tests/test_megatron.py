"""megatron-core comes in silence, whatever imports it first, and errors come through."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from attnres_train.megatron import megatron_core

GRID = 'from attnres_train.megatron import megatron_core; megatron_core("parallel_state")'
DATA_SETS = """
from attnres_train.data.megatron import megatron_datasets
for name in ("indexed_dataset", "gpt_dataset", "blended_dataset"):
    megatron_datasets(name)
"""


def fresh_process(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    """``code`` in a process that shows every warning, with ``path`` in front of Python's; as of a
    user without a launcher."""
    folders = [*map(str, path), *filter(None, sys.path)]
    environment = {name: v for name, v in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    # The compiler warns each time where what it compiled is not kept.
    environment |= {"PYTHONPATH": os.pathsep.join(folders), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("code", [GRID + DATA_SETS, DATA_SETS + GRID], ids=["grid", "data"])
def test_nothing_is_on_the_screen(code: str) -> None:
    """``code`` imports the room of its id first."""
    result = fresh_process(code)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


# What releases of megatron-core do at import or, `who`, whenever their classes log.
LOUD = r"""
import logging, warnings
'''\-'''
warnings.warn("Transformer Engine and Apex are not installed")
warnings.warn_explicit("old", DeprecationWarning, "torch/jit/_script.py", 1)
logging.getLogger("torch.utils.cpp_extension").warning("No CUDA runtime is found")
def who():
    warnings.warn("Could not determine rank from torch.distributed, RANK. Defaulting to rank 0.")
"""


@pytest.fixture
def loud(tmp_path: Path) -> Path:
    """A folder with a megatron-core of its own, ``loud`` its only module."""
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "__init__.py").touch()
    (core / "loud.py").write_text(LOUD, encoding="utf-8")
    return tmp_path


def test_what_is_silenced(loud: Path) -> None:
    without = fresh_process("import megatron.core.loud as loud; loud.who()", loud)
    for text in ("invalid escape", "Transformer Engine", "old", "No CUDA", "determine rank"):
        assert text in without.stderr
    code = "from attnres_train.megatron import megatron_core; megatron_core('loud').who()"
    result = fresh_process(code, loud)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_others_are_heard(loud: Path) -> None:
    with (loud / "megatron" / "core" / "loud.py").open("a", encoding="utf-8") as file:
        file.write("warnings.warn_explicit('driver too old', UserWarning, 'torch/cuda.py', 1)\n")
    code = """
import logging, warnings
from attnres_train.megatron import megatron_core
megatron_core("loud")
warnings.warn("mine")
warnings.warn("mine too", DeprecationWarning)
logging.getLogger("me").warning("logged")
"""
    told = fresh_process(code, loud).stderr.splitlines()
    # From 3.13 on the source of `-c` is shown too, below each warning.
    lines = [line for line in told if not line.startswith("  ")]
    shown = ("driver too old", "UserWarning: mine", "DeprecationWarning: mine too", "logged")
    assert len(lines) == len(shown)
    assert all(text in line for text, line in zip(shown, lines, strict=True))


def test_an_import_that_fails_says_so_and_leaves_nothing() -> None:
    filters, disabled = list(warnings.filters), logging.root.manager.disable
    with pytest.raises(ModuleNotFoundError, match=r"megatron\.core\.nonesuch"):
        megatron_core("nonesuch")
    assert (warnings.filters, logging.root.manager.disable) == (filters, disabled)
