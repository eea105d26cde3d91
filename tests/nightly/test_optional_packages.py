"""Tests that the tests' own environment skips, in one that has what they need."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.nightly.environments import interpreter_with
from tests.tiny import environment

ROOT = Path(__file__).parents[2]
FILES = ("tests/evaluation/test_harness.py", "tests/data/corpora/test_saved_dataset.py")


@pytest.mark.nightly
def test_with_lm_eval_and_datasets(tmp_path):
    python = interpreter_with(tmp_path, lm_eval="lm-eval", datasets="datasets")
    command = [python, "-m", "pytest", "-n", "0", "-rs", *FILES]
    result = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0 and "skipped" not in result.stdout, result.stdout
